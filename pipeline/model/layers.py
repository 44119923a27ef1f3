"""Building blocks of the trained audio side: the MLP, attention without positions, and the flamingo block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.core.streams import Gain


def recompute(function: Callable[..., Any], *inputs: Tensor, draws: bool = False) -> Any:
    """Calls `function(*inputs)` and keeps only the inputs for the backward pass, which calls it again.

    Not reentrant: the reentrant form drops gradients of tensors that the function reaches other than by its inputs.

    Args:
        draws: the function draws random numbers (dropout), which the second call has to draw again.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return function(*inputs)


def has_dropout(module: nn.Module) -> bool:
    """Returns whether dropout is active somewhere in a module."""
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules())


class Mlp(nn.Module):
    """Linear-GELU-Linear; the activation is recomputed in the backward pass instead of being kept.

    Args:
        inner: width between the two; None means `width_out`.
    """

    def __init__(self, width: int, width_out: int, *, inner: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.input = nn.Linear(width, inner or width_out, bias=bias)
        self.output = nn.Linear(inner or width_out, width_out, bias=bias)

    def forward(self, x_NW: Tensor) -> Tensor:
        # Recomputation stops as soon as the activation exists again: the matrix product is not repeated.
        return recompute(self.finish, self.input(x_NW))

    def finish(self, h_NI: Tensor) -> Tensor:
        """Applies what follows `input`."""
        return self.output(F.gelu(h_NI))


class KeyValueGain(nn.Module):
    """Scales keys and values by one learnable number, as LayerScale (arXiv 2103.17239) scales a residual branch."""

    def __init__(self, gain: Gain) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.full((1,), gain.start))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.gain.start)

    def forward(self, k_NHE: Tensor, v_NHE: Tensor) -> tuple[Tensor, Tensor]:
        return k_NHE * self.weight if self.gain.target == "keys_values" else k_NHE, v_NHE * self.weight


class CrossAttention(nn.Module):
    """Multi-head attention of queries over keys and values of another width.

    Args:
        width: width of the queries and of the output.
        key_width: width of what they attend to.
        inner: width of all heads together.
    """

    def __init__(self, width: int, key_width: int, inner: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(key_width, inner, bias=bias)
        self.value = nn.Linear(key_width, inner, bias=bias)
        self.output = nn.Linear(inner, width, bias=bias)

    def keys_values(self, keys: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Projects keys and values, (..., H, E); the values are the keys if none are given."""
        k, v = self.key(keys), self.value(keys if values is None else values)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def attend(self, x_BQD: Tensor, keys_values: tuple[Tensor, Tensor], mask_BQK: Tensor | None = None) -> Tensor:
        """Returns (B, Q, D) from (B, K, H, E) keys and values; zero where a query attends to no key."""
        q_BHQE = self.query(x_BQD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BHKE, v_BHKE = (t.transpose(1, 2) for t in keys_values)
        if mask_BQK is None:
            out_BHQE = F.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE)
            return self.output(out_BHQE.transpose(1, 2).flatten(2))
        any_BQ1 = mask_BQK.any(-1, keepdim=True)
        out_BHQE = F.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE, attn_mask=(mask_BQK | ~any_BQ1)[:, None])
        return self.output(out_BHQE.transpose(1, 2).flatten(2)) * any_BQ1

    def forward(self, x_BQD: Tensor, keys_BKW: Tensor, mask_BQK: Tensor | None = None) -> Tensor:
        return self.attend(x_BQD, self.keys_values(keys_BKW), mask_BQK)


class FlamingoBlock(nn.Module):
    """Gated cross-attention and a gated FFN before a layer of the language model (arXiv 2204.14198, section 2.2).

    Both tanh gates start at zero, so that an untrained model equals the plain language model. The FFN acts on all
    text, the attention only where text attends to audio.
    """

    def __init__(self, hidden: int, audio_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = CrossAttention(hidden, audio_width, hidden, num_heads, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn_norm = nn.LayerNorm(hidden)
        self.ffn = Mlp(hidden, hidden, inner=4 * hidden, bias=False)
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], mask_BTS: Tensor) -> Tensor:
        attended_BTD = self.attention.attend(self.attention_norm(x_BTD), keys_values, mask_BTS)
        x_BTD = x_BTD + attended_BTD * self.attention_gate.tanh()
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)) * self.ffn_gate.tanh()
