"""The arithmetic of one decoder layer in the oracle: norms, projections, RoPE, attention and FFN of each family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

POST_NORM = ("olmo2",)  # no norm before a sublayer, one after it
SANDWICH_NORM = ("gemma2", "gemma3")  # a norm before and one after
ONE_PLUS_WEIGHT = ("gemma2", "gemma3")  # RMSNorm multiplies by 1 + weight
SCALED_EMBEDDINGS = ("gemma2", "gemma3")
HEAD_NORM = ("qwen3", "gemma3")  # q and k norms over each head; OLMo 2 has them over all heads together


@dataclass(frozen=True)
class LanguageModel:
    """Everything about a language model that is not a weight.

    Attributes:
        windows: for each layer the positions that a query attends back to, itself included; None for all.
        rope_theta: for each layer the base of the rotary frequencies.
        llama3_rope: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings; None for plain.
        score_scale: factor of the query-key products.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope_theta: tuple[float, ...]
    score_scale: float
    eps: float = 1e-5
    tied: bool = False
    llama3_rope: tuple[float, float, float, int] | None = None
    score_softcap: float | None = None
    logit_softcap: float | None = None


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softmax(scores: Tensor) -> Tensor:
    exp = torch.exp(scores - scores.max().detach())
    return exp / exp.sum()


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def rms_norm(lm: LanguageModel, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    if lm.family in ONE_PLUS_WEIGHT:
        weight = 1 + weight
    return x / torch.sqrt((x * x).sum() / len(x) + lm.eps) * weight


def input_norm(lm: LanguageModel, weights: Weights, layer: int, x: Tensor) -> Tensor:
    """Applies n_l, the norm before the attention of layer l; OLMo 2 has none."""
    return x if lm.family in POST_NORM else rms_norm(lm, weights, f"model.layers.{layer}.input_layernorm", x)


def rotary_frequencies(lm: LanguageModel, layer: int) -> list[float]:
    frequencies = [lm.rope_theta[layer] ** (-2 * i / lm.head_dim) for i in range(lm.head_dim // 2)]
    if lm.llama3_rope is None:
        return frequencies
    factor, low, high, context = lm.llama3_rope
    scaled = []
    for frequency in frequencies:
        turns = context * frequency / (2 * math.pi)  # over the original context
        if turns > high:
            scaled.append(frequency)
        elif turns < low:
            scaled.append(frequency / factor)
        else:
            smooth = (turns - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def rotate(lm: LanguageModel, layer: int, x: Tensor, position: int) -> Tensor:
    """Rotates each pair (x_i, x_{i + half}) of one head by position * frequency_i."""
    half = lm.head_dim // 2
    angles = [position * frequency for frequency in rotary_frequencies(lm, layer)]
    cos = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64)
    sin = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64)
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def heads(lm: LanguageModel, weights: Weights, layer: int, kind: str, x: Tensor) -> list[Tensor]:
    """Returns the heads of one token after W_Q, W_K or W_V (`kind` is q, k or v) and the family's norm; not rotated."""
    prefix = f"model.layers.{layer}.self_attn"
    y = linear(weights, f"{prefix}.{kind}_proj", x)
    if kind != "v" and lm.family == "olmo2":
        y = rms_norm(lm, weights, f"{prefix}.{kind}_norm", y)
    count = lm.num_heads if kind == "q" else lm.num_key_value_heads
    per_head = [y[i * lm.head_dim : (i + 1) * lm.head_dim] for i in range(count)]
    if kind != "v" and lm.family in HEAD_NORM:
        per_head = [rms_norm(lm, weights, f"{prefix}.{kind}_norm", head) for head in per_head]
    return per_head


def attention_output(
    lm: LanguageModel,
    weights: Weights,
    layer: int,
    query: list[Tensor],
    keys: list[list[Tensor]],
    values: list[list[Tensor]],
) -> Tensor:
    """Returns W_O of one query's attention over the keys that it attends to (rotated, `[key][head]`)."""
    group = lm.num_heads // lm.num_key_value_heads
    outputs = []
    for head in range(lm.num_heads):
        key_head = head // group
        products = torch.stack([key[key_head] for key in keys]) @ query[head]
        probabilities = softmax(softcap(products * lm.score_scale, lm.score_softcap))
        outputs.append(probabilities @ torch.stack([value[key_head] for value in values]))
    return linear(weights, f"model.layers.{layer}.self_attn.o_proj", torch.cat(outputs))


def add_attention(lm: LanguageModel, weights: Weights, layer: int, x: Tensor, output: Tensor) -> Tensor:
    """Returns text' = text + W_O O, with the norm that some families put behind it."""
    if lm.family in POST_NORM + SANDWICH_NORM:
        output = rms_norm(lm, weights, f"model.layers.{layer}.post_attention_layernorm", output)
    return x + output


def add_ffn(lm: LanguageModel, weights: Weights, layer: int, x: Tensor) -> Tensor:
    """Returns text'' = text' + FFN(n2(text'))."""
    prefix = f"model.layers.{layer}"
    h = x
    if lm.family in SANDWICH_NORM:
        h = rms_norm(lm, weights, f"{prefix}.pre_feedforward_layernorm", h)
    elif lm.family not in POST_NORM:
        h = rms_norm(lm, weights, f"{prefix}.post_attention_layernorm", h)
    gate = linear(weights, f"{prefix}.mlp.gate_proj", h)
    gate = gelu_tanh(gate) if lm.family.startswith("gemma") else silu(gate)
    h = linear(weights, f"{prefix}.mlp.down_proj", gate * linear(weights, f"{prefix}.mlp.up_proj", h))
    if lm.family in POST_NORM + SANDWICH_NORM:
        h = rms_norm(lm, weights, f"{prefix}.post_feedforward_layernorm", h)
    return x + h


def embed(lm: LanguageModel, weights: Weights, token: int) -> Tensor:
    x = weights["model.embed_tokens.weight"][token]
    return x * math.sqrt(lm.hidden_size) if lm.family in SCALED_EMBEDDINGS else x


def logits(lm: LanguageModel, weights: Weights, x: Tensor) -> Tensor:
    name = "model.embed_tokens" if lm.tied else "lm_head"
    return softcap(linear(weights, name, rms_norm(lm, weights, "model.norm", x)), lm.logit_softcap)
