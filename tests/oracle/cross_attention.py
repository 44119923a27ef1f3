"""The oracle's attention without positions, for connectors and flamingo blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracle.language_model import Weights, gelu, linear, softmax


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.output", gelu(linear(weights, f"{name}.input", x)))


def cross_attention(
    weights: Weights, name: str, num_heads: int, x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """Computes multi-head attention of one query over all keys."""
    query = linear(weights, f"{name}.query", x)
    projected_keys = [linear(weights, f"{name}.key", key) for key in keys]
    projected_values = [linear(weights, f"{name}.value", value) for value in values]
    width = len(query) // num_heads
    outputs = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        products = torch.stack([key[part] for key in projected_keys]) @ query[part]
        probabilities = softmax(products / math.sqrt(width))
        outputs.append(probabilities @ torch.stack([value[part] for value in projected_values]))
    return linear(weights, f"{name}.output", torch.cat(outputs))


def flamingo_block(weights: Weights, num_heads: int, x: Tensor, audio: Sequence[Tensor]) -> Tensor:
    """Applies gated cross-attention to the audio tokens that a token attends to, if any, then a gated FFN."""
    if audio:
        h = layer_norm(weights, "attention_norm", x)
        x = x + torch.tanh(weights["attention_gate"]) * cross_attention(
            weights, "attention", num_heads, h, audio, audio
        )
    return x + torch.tanh(weights["ffn_gate"]) * mlp(weights, "ffn", layer_norm(weights, "ffn_norm", x))
