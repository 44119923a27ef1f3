"""Configs of language models, read from a folder or the Hub, or listed here by name, so that a run can be planned
without weights or network access."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from pipeline.core.errors import UserError
from pipeline.core.gguf import refuse_gguf

_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}

# From Meta's config.json of these models on the Hugging Face Hub.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def published_shape(name: str) -> LlamaConfig | None:
    """Returns the config of a listed language model by the last part of its Hub name (`meta-llama/Llama-3.2-1B`, or its
    instruction-tuned variant); None if it is not listed.

    Raises:
        UserError: it is a folder of GGUF files.
    """
    refuse_gguf(name)
    shape = SHAPES.get(name.rpartition("/")[2].lower().removesuffix("-instruct"))
    return None if shape is None else LlamaConfig(**_LLAMA_3, **shape)


def language_model_config(name: str) -> PretrainedConfig:
    """Returns the config of a Hugging Face folder or Hub name.

    Raises:
        UserError: it cannot be read, or is a folder of GGUF files.
    """
    refuse_gguf(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = f"'{name}' cannot be read ({str(error).splitlines()[0]})"
        raise UserError("model.language_model", fault, "name a Hugging Face folder or a model on the Hub") from error
