"""Softmax attention over tensors and masks behind one signature (SDPA, FlexAttention or explicit scores)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

KeysValues = tuple[Tensor, Tensor]
RECOMPILED_TOO_OFTEN = (
    "FlexAttention has been compiled as often as torch._dynamo.config.recompile_limit allows, and would compute dense "
    "scores from now on: run with TORCH_LOGS=recompiles to see what changes between batches, raise that limit, or set "
    'the model\'s attention_path to "sdpa"'
)


def attend(
    query: Tensor,
    blocks: Sequence[KeysValues],
    mask: Tensor | BlockMask | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Computes softmax attention over the keys of all blocks together.

    Args:
        query: (B, H, Q, E).
        blocks: keys and values, (B or 1, kv_heads, keys of the block, E) each; 1 where all rows share them.
        mask: (B, 1, Q, K) additive, K the keys of all blocks; a block mask, for FlexAttention; None for the causal
            mask of Q = K in memory order.
        softcap: bound of the scores, score -> softcap * tanh(score / softcap).

    Returns:
        (B, H, Q, E).
    """
    if isinstance(mask, BlockMask):
        return _flex(query, _join(query, blocks), mask, scaling, softcap)
    # One query: keys are read, not copied. A single block on a CPU needs no copy for the fused kernel either.
    decoding = query.shape[2] == 1 and (len(blocks) > 1 or query.is_cuda)
    if mask is not None and (softcap is not None or decoding):
        return _explicit(query, blocks, mask, scaling, dropout, softcap)
    if mask is None and softcap is not None:
        return _explicit(query, blocks, _causal_mask(query), scaling, dropout, softcap)
    key, value = _join(query, blocks)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def attention_weights(
    query: Tensor, blocks: Sequence[KeysValues], mask: Tensor | None, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Returns the weights by which `attend` sums the values, (B, H, Q, K) float32: each row sums to 1."""
    return _weights(query, blocks, _causal_mask(query) if mask is None else mask, scaling, softcap).flatten(1, 2)


def _causal_mask(query: Tensor) -> Tensor:
    n = query.shape[2]
    return torch.full((n, n), float("-inf"), dtype=query.dtype, device=query.device).triu(1)[None, None]


def _join(query: Tensor, blocks: Sequence[KeysValues]) -> KeysValues:
    """Concatenates all blocks, with a row for each row of queries."""
    if len(blocks) == 1:
        return blocks[0]
    parts = [[x.expand(len(query), -1, -1, -1) for x in block] for block in blocks]
    return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2)


def _flex(query: Tensor, joined: KeysValues, mask: BlockMask, scaling: float, softcap: float | None) -> Tensor:
    def bound(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    function: Any = compiled_flex() if query.is_cuda else flex_attention
    score_mod = None if softcap is None else bound
    key, value = (x.contiguous() for x in joined)  # with and without audio in front: one compiled entry for both
    with recompilation_errors():
        return function(query, key, value, score_mod, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])


@contextmanager
def recompilation_errors() -> Iterator[None]:
    """Names the remedy where torch's limit of recompilations is reached.

    Raises:
        RuntimeError: the limit is reached.
    """
    try:
        yield
    except Exception as error:
        from torch._dynamo.exc import FailOnRecompileLimitHit  # takes a second, which no other run should pay

        if isinstance(error, FailOnRecompileLimitHit):
            raise RuntimeError(RECOMPILED_TOO_OFTEN) from error
        raise


@cache
def compiled_flex() -> Callable[..., Any]:
    """Returns FlexAttention compiled for any size; uncompiled it would materialise all scores.

    `fullgraph`: at its limit of recompilations torch raises an error, where by default it would continue uncompiled.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _explicit(
    query: Tensor,
    blocks: Sequence[KeysValues],
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Computes scores block by block: copies no key and no value (decoding), and can bound the scores (Gemma 2)."""
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
    """Returns (B, kv_heads, query heads of a kv head, Q, K), float32 at least."""
    n, kv_heads = query.shape[2], blocks[-1][0].shape[1]
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # query heads that share keys, and queries, in one axis
    scores = torch.cat([_matmul(grouped, k.transpose(2, 3)) for k, _ in blocks], dim=-1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(2, (-1, n)) + mask[:, None]
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies (B, H, m, k) by (B or 1, H, k, n); a `right` that all rows share is read once, not copied for each."""
    if len(right) == len(left):
        return left @ right
    rows, _, m, _ = left.shape
    folded = left.transpose(0, 1).flatten(1, 2) @ right[0]
    return folded.unflatten(1, (rows, m)).transpose(0, 1)
