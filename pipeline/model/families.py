"""What audio beside the sequence needs to know about each family of language models: norms, RoPE, windows, softcaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.core.errors import UserError


@dataclass(frozen=True)
class Family:
    """Facts of one family that its config does not state.

    Attributes:
        input_norm: attribute name of the norm before attention in a decoder layer; None where attention reads the
            residual stream itself (OLMo 2 norms afterwards).
        key_norm: norm of keys and queries: None, `head` (each head alone) or `width` (all heads together).
    """

    input_norm: str | None = "input_layernorm"
    key_norm: str | None = None


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(key_norm="head"),
    "gemma2": Family(),
    "gemma3_text": Family(key_norm="head"),
    "olmo2": Family(input_norm=None, key_norm="width"),
}

# These change their frequencies with the longest position of a call, so keys of two calls would not match.
VARIABLE_ROPE = ("dynamic", "longrope")


def family_of(config: PretrainedConfig) -> Family:
    """Returns the family of a language model.

    Raises:
        UserError: the family, or this variant of it, has an attention that is not reproduced exactly here.
    """
    remedy = f"use a decoder of {', '.join(FAMILIES)}"
    if config.model_type not in FAMILIES:
        raise UserError("model.language_model", f"family '{config.model_type}' is not supported", remedy)
    if config.model_type == "gemma3_text" and config.use_bidirectional_attention:
        raise UserError("model.language_model", "attends to later text (use_bidirectional_attention)", remedy)
    values = config.to_dict()  # transformers 4 writes rope_scaling, if anything; 5 writes rope_parameters
    rope_settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for settings in (rope_settings, *(v for v in rope_settings.values() if isinstance(v, dict))):
        kind = settings.get("rope_type") or settings.get("type")
        if kind in VARIABLE_ROPE:
            raise UserError("model.language_model", f"its '{kind}' rope changes with the length of a text", remedy)
    return FAMILIES[config.model_type]


def audio_embedding_scale(language_model: PreTrainedModel) -> Tensor | None:
    """Returns the factor that the model applies to `inputs_embeds` (audio tokens are divided by it first), or None.

    transformers 4 scales Gemma 2's embeddings inside the decoder, later versions (and Gemma 3) inside the embedding.
    """
    config = language_model.config
    embedding = language_model.get_input_embeddings()
    if config.model_type != "gemma2" or hasattr(embedding, "embed_scale"):
        return None
    return torch.tensor(config.hidden_size**0.5)


def rope(language_model: PreTrainedModel, layer: int, like: Tensor, position_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin), each (B, S, E), of the given layer at these positions.

    Calls `forward` and not the module: it has no parameters, and ZeRO-3 needs every rank to call the same modules the
    same number of times, including a rank whose batch holds no audio to rotate.
    """
    decoder: Any = language_model.model
    if language_model.config.model_type != "gemma3_text":
        return decoder.rotary_emb.forward(like, position_BS)
    layer_type = language_model.config.layer_types[layer]
    if hasattr(decoder, "rotary_emb_local"):  # transformers 4
        local = layer_type == "sliding_attention"
        return (decoder.rotary_emb_local if local else decoder.rotary_emb).forward(like, position_BS)
    return decoder.rotary_emb.forward(like, position_BS, layer_type)


def rope_kind(config: PretrainedConfig, layer: int) -> str:
    """Returns a name of the layer's RoPE: layers of one name share it."""
    return config.layer_types[layer] if config.model_type == "gemma3_text" else "all"


def rotate(x_BSHE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Applies rotary embedding, half by half as in all families here, in the precision of cos (float32 in some)."""
    first, second = x_BSHE.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x_BSHE * cos_BSE.unsqueeze(2) + rotated * sin_BSE.unsqueeze(2)).to(x_BSHE.dtype)


def project_heads(attention: Any, family: Family, kind: str, x_ND: Tensor) -> Tensor:
    """Computes (N, H, E) queries (`q`) or keys (`k`), not rotated, by the layer's own modules.

    They are called as modules, so that ZeRO-3's and LoRA's hooks run.
    """
    x_NI = getattr(attention, f"{kind}_proj")(x_ND)
    if family.key_norm == "width":
        x_NI = getattr(attention, f"{kind}_norm")(x_NI)
    x_NHE = x_NI.unflatten(-1, (-1, attention.head_dim))
    return getattr(attention, f"{kind}_norm")(x_NHE) if family.key_norm == "head" else x_NHE


def project_keys_values(attention: Any, family: Family, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (N, kv_heads, E) keys, not rotated, and values."""
    k_NHE = project_heads(attention, family, "k", x_ND)
    return k_NHE, attention.v_proj(x_ND).unflatten(-1, (-1, attention.head_dim))


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """Returns a layer's sliding window in positions; None for none."""
    if config.model_type == "mistral":
        return config.sliding_window
    types = getattr(config, "layer_types", None)
    return config.sliding_window if types and types[layer] == "sliding_attention" else None


def score_softcap(config: PretrainedConfig) -> float | None:
    """Returns the bound of the attention scores; Gemma 3 has the setting but transformers does not apply it."""
    return config.attn_logit_softcapping if config.model_type == "gemma2" else None


def logit_softcap(config: PretrainedConfig) -> float | None:
    """Returns the bound of the logits over the vocabulary."""
    return config.final_logit_softcapping if config.model_type in ("gemma2", "gemma3_text") else None
