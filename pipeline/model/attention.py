"""The attention function that transformers calls in every layer, and the kernels behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from pipeline.model.context import AttentionContext

# No mask builder is registered under this name, so transformers makes no mask of its own.
ATTENTION_NAME = "pal"


def pal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pal: AttentionContext,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # transformers adds keywords of its own from version to version
) -> tuple[Tensor, None]:
    """Attention of text (and PLITS) queries over the sequence's keys and, at an audio layer, over LAL's.

    Args:
        query: (B, heads, Nq, head_dim); key and value: (B, kv_heads, Nk, head_dim), rotated already.
        attention_mask: None; masks come from `pal`.
        pal: the context of this forward pass.
        softcap: bound of the scores, score -> softcap * tanh(score / softcap).

    Returns:
        (B, Nq, heads, head_dim), and no weights.
    """
    window = pal.effective_window(sliding_window)
    active = pal.audio.active(module.layer_idx)
    audio, zero = None, None
    if active and pal.audio.dummy:
        # Every rank runs every trainable module in every step, or a collective operation would wait for ever.
        zero = sum(x.sum() for x in pal.audio.flat(module.layer_idx)) * 0
        active = ()
    elif active:
        audio = pal.audio.placed(module.layer_idx)
    if softcap is not None or (query.shape[2] == 1 and key.shape[2] > 1):
        out = _scores_attention(pal, active, audio, query, key, value, window, scaling, dropout, softcap)
    else:
        out = _sdpa_attention(pal, active, audio, query, key, value, window, scaling, dropout)
    out = out.transpose(1, 2)
    return (out if zero is None else out + zero), None


def _sdpa_attention(
    pal: AttentionContext,
    active: tuple[int, ...],
    audio: tuple[Tensor, Tensor] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    if audio is None and pal.plain_causal and window is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=gqa
        )
    if audio is not None:
        k_audio, v_audio = (x.expand(len(query), -1, -1, -1) for x in audio)
        key, value = torch.cat([k_audio, key], dim=2), torch.cat([v_audio, value], dim=2)
    mask = pal.mask(active, window, query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=gqa
    )


def _scores_attention(
    pal: AttentionContext,
    active: tuple[int, ...],
    audio: tuple[Tensor, Tensor] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Scores written out, audio and sequence as two blocks.

    For single queries (decoding) this copies no key and no value; and it can bound the scores.
    """
    blocks = [(key, value)] if audio is None else [audio, (key, value)]
    q_BKGD = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # heads that share keys, and queries, in one axis
    scores = torch.cat([_matmul(q_BKGD, k.transpose(2, 3)) for k, _ in blocks], dim=-1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = pal.mask(active, window, query.dtype)
    scores = scores.unflatten(2, (-1, query.shape[2])) + mask[:, None]
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0).flatten(2, 3)
    parts = weights.split([k.shape[2] for k, _ in blocks], dim=-1)
    out = sum(_matmul(w, v) for w, (_, v) in zip(parts, blocks, strict=True))
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2)


def _matmul(x_BKND: Tensor, y_BKDM: Tensor) -> Tensor:
    """Matrix product for each row and head; a `y` that all rows share is read once, not copied for each."""
    if len(y_BKDM) == len(x_BKND):
        return x_BKND @ y_BKDM
    rows, _, n, _ = x_BKND.shape
    folded = x_BKND.transpose(0, 1).flatten(1, 2) @ y_BKDM[0]
    return folded.unflatten(1, (rows, n)).transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, pal_attention)
