"""Attention kernels behind one signature. They know tensors and masks, nothing of audio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


def attend(
    query: Tensor,
    blocks: Sequence[KeysValues],
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention over the keys of all blocks together.

    Args:
        query: (B, heads, N, head_dim).
        blocks: keys and values, (B or 1, kv_heads, K, head_dim) each; 1 where all rows share them.
        mask: (B, 1, N, sum of K) additive; None for the causal mask of N = K in memory order.
        softcap: bound of the scores, score -> softcap * tanh(score / softcap).

    Returns:
        (B, heads, N, head_dim).
    """
    if mask is not None and (softcap is not None or query.shape[2] == 1):
        return _written_out(query, blocks, mask, scaling, dropout, softcap)
    if mask is None and softcap is not None:
        n = query.shape[2]
        mask = torch.full((n, n), float("-inf"), dtype=query.dtype, device=query.device).triu(1)[None, None]
        return _written_out(query, blocks, mask, scaling, dropout, softcap)
    if len(blocks) == 1:
        key, value = blocks[0]
    else:
        parts = [[x.expand(len(query), -1, -1, -1) for x in block] for block in blocks]
        key, value = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def _written_out(
    query: Tensor,
    blocks: Sequence[KeysValues],
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Scores block by block: copies no key and no value (decoding), and can bound the scores (Gemma 2)."""
    n, kv_heads = query.shape[2], blocks[-1][0].shape[1]
    q_BKGD = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # heads that share keys, and queries, in one axis
    scores = torch.cat([_matmul(q_BKGD, k.transpose(2, 3)) for k, _ in blocks], dim=-1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(2, (-1, n)) + mask[:, None]
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0).flatten(2, 3)
    parts = weights.split([k.shape[2] for k, _ in blocks], dim=-1)
    outputs = [_matmul(w, v) for w, (_, v) in zip(parts, blocks, strict=True)]
    out = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
    return out.unflatten(2, (-1, n)).flatten(1, 2)


def _matmul(x_BKND: Tensor, y_BKDM: Tensor) -> Tensor:
    """Matrix product for each row and head; a `y` that all rows share is read once, not copied for each."""
    if len(y_BKDM) == len(x_BKND):
        return x_BKND @ y_BKDM
    rows, _, n, _ = x_BKND.shape
    folded = x_BKND.transpose(0, 1).flatten(1, 2) @ y_BKDM[0]
    return folded.unflatten(1, (rows, n)).transpose(0, 1)
