"""Building blocks of the trained audio side: the MLP, attention without positions, and the flamingo block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, of which only the inputs are kept for the backward pass.

    Without reentrance: the reentrant form drops gradients of what the function reaches by other ways than its inputs.
    And without dropout: the state of the random numbers is not restored.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class Mlp(nn.Module):
    """Linear-GELU-Linear; the activation is computed again in the backward pass instead of being kept.

    Args:
        inner: width between the two; None means `width_out`.
    """

    def __init__(self, width: int, width_out: int, *, inner: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.input = nn.Linear(width, inner or width_out, bias=bias)
        self.output = nn.Linear(inner or width_out, width_out, bias=bias)

    def forward(self, x_NW: Tensor) -> Tensor:
        # Recomputation stops as soon as the activation is there again: the matrix product is not repeated.
        return recompute(self.finish, self.input(x_NW))

    def finish(self, h_NI: Tensor) -> Tensor:
        """What follows `input`."""
        return self.output(F.gelu(h_NI))


class CrossAttention(nn.Module):
    """Multi-head attention of queries over keys and values of another width.

    Args:
        width, key_width: of the queries and of what they attend to.
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
        """Projected keys and values, (..., heads, head_dim)."""
        k, v = self.key(keys), self.value(keys if values is None else values)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def attend(self, x_BND: Tensor, keys_values: tuple[Tensor, Tensor], seen_BNK: Tensor | None = None) -> Tensor:
        """(B, N, width) from (B, K, heads, head_dim) keys and values; nothing where a query sees no key."""
        q_BHNE = self.query(x_BND).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BHKE, v_BHKE = (t.transpose(1, 2) for t in keys_values)
        if seen_BNK is None:
            out = F.scaled_dot_product_attention(q_BHNE, k_BHKE, v_BHKE)
            return self.output(out.transpose(1, 2).flatten(2))
        any_BN1 = seen_BNK.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q_BHNE, k_BHKE, v_BHKE, attn_mask=(seen_BNK | ~any_BN1)[:, None])
        return self.output(out.transpose(1, 2).flatten(2)) * any_BN1

    def forward(self, x_BND: Tensor, keys_BKW: Tensor, seen_BNK: Tensor | None = None) -> Tensor:
        return self.attend(x_BND, self.keys_values(keys_BKW), seen_BNK)


class FlamingoBlock(nn.Module):
    """Gated cross-attention and a gated FFN before a layer of the language model (arXiv 2204.14198, section 2.2).

    Both tanh gates are zero at the start, so that an untrained model is the plain one. The FFN acts on all text, the
    attention only where text sees audio.
    """

    def __init__(self, hidden: int, audio_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = CrossAttention(hidden, audio_width, hidden, num_heads, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn_norm = nn.LayerNorm(hidden)
        self.ffn = Mlp(hidden, hidden, inner=4 * hidden, bias=False)
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], seen_BTS: Tensor) -> Tensor:
        attended = self.attention.attend(self.attention_norm(x_BTD), keys_values, seen_BTS)
        x_BTD = x_BTD + attended * self.attention_gate.tanh()
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)) * self.ffn_gate.tanh()
