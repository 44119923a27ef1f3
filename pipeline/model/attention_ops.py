"""Attention kernels behind one signature. They know tensors and masks, nothing of audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

KeysValues = tuple[Tensor, Tensor]


def attend(
    query: Tensor,
    blocks: Sequence[KeysValues],
    mask: Tensor | BlockMask | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention over the keys of all blocks together.

    Args:
        query: (B, heads, N, head_dim).
        blocks: keys and values, (B or 1, kv_heads, K, head_dim) each; 1 where all rows share them.
        mask: (B, 1, N, sum of K) additive; a block mask, for FlexAttention; None for the causal mask of N = K in
            memory order.
        softcap: bound of the scores, score -> softcap * tanh(score / softcap).

    Returns:
        (B, heads, N, head_dim).
    """
    if isinstance(mask, BlockMask):
        return _flex(query, _joined(query, blocks), mask, scaling, softcap)
    # One query: keys are read, not copied. A single block on a CPU needs no copy for the fused kernel either.
    decoding = query.shape[2] == 1 and (len(blocks) > 1 or query.is_cuda)
    if mask is not None and (softcap is not None or decoding):
        return _written_out(query, blocks, mask, scaling, dropout, softcap)
    if mask is None and softcap is not None:
        n = query.shape[2]
        mask = torch.full((n, n), float("-inf"), dtype=query.dtype, device=query.device).triu(1)[None, None]
        return _written_out(query, blocks, mask, scaling, dropout, softcap)
    key, value = _joined(query, blocks)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def _joined(query: Tensor, blocks: Sequence[KeysValues]) -> KeysValues:
    """All blocks as one, with a row for each row of queries."""
    if len(blocks) == 1:
        return blocks[0]
    parts = [[x.expand(len(query), -1, -1, -1) for x in block] for block in blocks]
    return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2)


def _flex(query: Tensor, joined: KeysValues, mask: BlockMask, scaling: float, softcap: float | None) -> Tensor:
    def bound(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    function: Any = _compiled_flex() if query.is_cuda else flex_attention
    score_mod = None if softcap is None else bound
    return function(query, *joined, score_mod, mask, scale=scaling, enable_gqa=query.shape[1] != joined[0].shape[1])


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)  # uncompiled it would write out all scores


def attention_weights(
    query: Tensor, blocks: Sequence[KeysValues], mask: Tensor | None, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """What `attend` weighs the values with: (B, heads, N, sum of K) float32, each row sums to 1. For looking at."""
    n = query.shape[2]
    if mask is None:
        mask = torch.full((n, n), float("-inf"), dtype=query.dtype, device=query.device).triu(1)[None, None]
    return _weights(query, blocks, mask, scaling, softcap).flatten(1, 2)


def _written_out(
    query: Tensor,
    blocks: Sequence[KeysValues],
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Scores block by block: copies no key and no value (decoding), and can bound the scores (Gemma 2)."""
    n = query.shape[2]
    weights = _weights(query, blocks, mask, scaling, softcap).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    parts = weights.flatten(2, 3).split([k.shape[2] for k, _ in blocks], dim=-1)
    out = reduce(torch.add, [_matmul(w, v) for w, (_, v) in zip(parts, blocks, strict=True)])
    return out.unflatten(2, (-1, n)).flatten(1, 2)


def _weights(
    query: Tensor, blocks: Sequence[KeysValues], mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """(B, kv_heads, heads that share them, N, sum of K), float32 at least."""
    n, kv_heads = query.shape[2], blocks[-1][0].shape[1]
    q_BKGD = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # heads that share keys, and queries, in one axis
    scores = torch.cat([_matmul(q_BKGD, k.transpose(2, 3)) for k, _ in blocks], dim=-1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(2, (-1, n)) + mask[:, None]
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _matmul(x_BKND: Tensor, y_BKDM: Tensor) -> Tensor:
    """Matrix product for each row and head; a `y` that all rows share is read once, not copied for each."""
    if len(y_BKDM) == len(x_BKND):
        return x_BKND @ y_BKDM
    rows, _, n, _ = x_BKND.shape
    folded = x_BKND.transpose(0, 1).flatten(1, 2) @ y_BKDM[0]
    return folded.unflatten(1, (rows, n)).transpose(0, 1)
