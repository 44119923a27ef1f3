"""One tiny language model per supported family, as a transformers config and as the oracle's settings."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.oracle.language_model import LanguageModel

VOCABULARY = 29
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Name -> (model_type, what differs from SIZE). Windows are shorter than the conversations of the tests.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_mha_tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama3_rope": ("llama", {"rope_scaling": LLAMA3_ROPE, "head_dim": 12, "num_attention_heads": 2}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "olmo2": ("olmo2", {}),
    "gemma2": (
        "gemma2",
        {
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 10,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 10,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_local_base_freq": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
}


def stock_config(name: str, **changes: Any) -> PretrainedConfig:
    model_type, values = FAMILIES[name]
    return AutoConfig.for_model(model_type, **deepcopy({**SIZE, **values, **changes}))  # transformers 5 edits them


def oracle_language_model(name: str, **changes: Any) -> LanguageModel:
    model_type, values = FAMILIES[name]
    values = {**SIZE, **values, **changes}
    layers = values["num_hidden_layers"]
    sliding = [True] * layers if model_type == "mistral" else [False] * layers
    if values.get("use_sliding_window"):
        sliding = [layer >= values["max_window_layers"] for layer in range(layers)]
    if "layer_types" in values:
        sliding = [kind == "sliding_attention" for kind in values["layer_types"]]
    local_theta = values.get("rope_local_base_freq", values["rope_theta"])
    scaling = values.get("rope_scaling")
    return LanguageModel(
        family=model_type.removesuffix("_text"),
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=layers,
        num_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        windows=tuple(values["sliding_window"] if slides else None for slides in sliding),
        rope_theta=tuple(local_theta if slides else values["rope_theta"] for slides in sliding),
        score_scale=1 / math.sqrt(values.get("query_pre_attn_scalar", values["head_dim"])),
        eps=values["rms_norm_eps"],
        tied=values["tie_word_embeddings"],
        llama3_rope=None if scaling is None else tuple(scaling[key] for key in list(LLAMA3_ROPE)[1:]),
        score_softcap=values.get("attn_logit_softcapping"),
        logit_softcap=values.get("final_logit_softcapping"),
    )


def stock_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model = (
        AutoModelForCausalLM.from_config(stock_config(name, **changes), attn_implementation="eager")
        .to(torch.get_default_dtype())
        .eval()
    )
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Draws all parameters so that each matters: norms off their neutral point, biases and gates off zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[1:].numel()))
            else:
                parameter.copy_(0.5 + 0.3 * noise)
