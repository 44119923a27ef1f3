"""The one rule of who sees whom, and the masks made of it (method: Mask)."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.model.layout import Places


def visible(query: Places, key: Places, window: int | None, system_text_sees_audio: bool) -> Tensor:
    """(B, Nq, Nk) bool: a query sees a key of its own conversation or of the shared prefix, not after its position.

    Args:
        window: a sliding window in positions; None for none.
        system_text_sees_audio: lift the position rule for text queries and audio keys.
    """
    later = key.position[:, None, :] > query.position[:, :, None]
    if system_text_sees_audio:
        later = later & ~(key.audio[:, None, :] & ~query.audio[:, :, None])
    seen = key.valid[:, None, :] & ~later
    seen &= (key.segment[:, None, :] == 0) | (key.segment[:, None, :] == query.segment[:, :, None])
    if window is not None:
        seen &= query.position[:, :, None] - key.position[:, None, :] < window
    return seen


def additive_mask(seen_BQK: Tensor, valid_query_BQ: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, Nq, Nk): 0 where seen, -inf elsewhere; padding as a query sees everything, so that it stays finite."""
    hidden = ~seen_BQK & valid_query_BQ[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None]
