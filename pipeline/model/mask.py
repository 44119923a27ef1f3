"""The one rule of who sees whom, and the masks made of it (method: Mask)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pipeline.model.positions import TokenMetadata


class MaskRule(NamedTuple):
    """A query sees a key of its own conversation or of the shared prefix, not after its own position.

    Attributes:
        window: a sliding window in positions; None for none.
        system_text_sees_audio: lift the position rule for text queries and audio keys.
    """

    window: int | None = None
    system_text_sees_audio: bool = False

    def sees(self, query: TokenMetadata, key: TokenMetadata) -> Tensor:
        """Bool, element by element; the tensors of `query` and `key` broadcast against each other."""
        later = key.position > query.position
        if self.system_text_sees_audio:
            later = later & ~(key.audio & ~query.audio)
        seen = key.valid & ~later & ((key.segment == 0) | (key.segment == query.segment))
        if self.window is not None:
            seen = seen & (query.position - key.position < self.window)
        return seen


def visible(rule: MaskRule, query: TokenMetadata, key: TokenMetadata) -> Tensor:
    """(B, Nq, Nk) bool."""
    return rule.sees(query.map(lambda x: x[:, :, None]), key.map(lambda x: x[:, None, :]))


def additive_mask(rule: MaskRule, query: TokenMetadata, key: TokenMetadata, dtype: torch.dtype) -> Tensor:
    """(B, 1, Nq, Nk): 0 where seen, -inf elsewhere; padding as a query sees everything, so that it stays finite."""
    hidden = ~visible(rule, query, key) & query.valid[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None]


def block_mask(rule: MaskRule, query: TokenMetadata, key: TokenMetadata) -> BlockMask:
    """The same for FlexAttention, which skips blocks without a visible pair. No dense mask exists on a GPU."""

    def sees(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule.sees(query.map(lambda x: x[row, q]), key.map(lambda x: x[row, k]))

    (rows, nq), nk, device = query.valid.shape, key.valid.shape[1], query.valid.device
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, rows, None, nq, nk, device=device)
