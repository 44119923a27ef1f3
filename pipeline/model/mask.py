"""The mask rule (which query attends to which key) and the masks built from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pipeline.model.attention_ops import recompilation_errors
from pipeline.model.positions import TokenMetadata


class MaskRule(NamedTuple):
    """A query attends to keys of its own conversation and of the shared prefix, none after its own position.

    Attributes:
        window: a sliding window in positions; None for none.
        system_text_sees_audio: lift the position rule for text queries and audio keys.
    """

    window: int | None = None
    system_text_sees_audio: bool = False

    def mask_mod(self, query: TokenMetadata, key: TokenMetadata) -> Tensor:
        """Returns bool, element by element: the query attends to the key. `query` and `key` broadcast."""
        later = key.position > query.position
        if self.system_text_sees_audio:
            later = later & ~(key.audio & ~query.audio)
        allowed = key.valid & ~later & ((key.segment == 0) | (key.segment == query.segment))
        if self.window is not None:
            allowed = allowed & (query.position - key.position < self.window)
        return allowed


def bool_mask(rule: MaskRule, query: TokenMetadata, key: TokenMetadata) -> Tensor:
    """Returns (B, Q, K) bool: True where a query attends to a key."""
    return rule.mask_mod(query.map(lambda x: x[:, :, None]), key.map(lambda x: x[:, None, :]))


def additive_mask(rule: MaskRule, query: TokenMetadata, key: TokenMetadata, dtype: torch.dtype) -> Tensor:
    """Returns (B, 1, Q, K): 0 where a query attends, -inf elsewhere; padding attends to all keys, to stay finite."""
    masked_BQK = ~bool_mask(rule, query, key) & query.valid[:, :, None]
    mask_BQK = torch.zeros(masked_BQK.shape, dtype=dtype, device=masked_BQK.device)
    return mask_BQK.masked_fill_(masked_BQK, float("-inf"))[:, None]


def block_mask(rule: MaskRule, query: TokenMetadata, key: TokenMetadata) -> BlockMask:
    """Builds the same mask for FlexAttention, which skips blocks without an attended pair; not dense on a GPU."""

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule.mask_mod(query.map(lambda x: x[row, q]), key.map(lambda x: x[row, k]))

    # Tensors of its own: compiled code tells keys that are the queries themselves from keys that are not.
    key = key.map(lambda x: x.contiguous().view_as(x))
    (rows, queries), keys, device = query.valid.shape, key.valid.shape[1], query.valid.device
    make = compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    with recompilation_errors(), torch.no_grad():  # in training and validation the same compiled entry
        return make(mask_mod, rows, None, queries, keys, device=device)


@cache
def compiled_create_block_mask() -> Callable[..., BlockMask]:
    """Returns the builder of block masks, compiled for any size, without a fall-back to a dense mask."""
    return torch.compile(create_block_mask, dynamic=True, fullgraph=True)
