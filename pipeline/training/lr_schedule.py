"""The learning-rate schedule: linear warm-up, then a cosine."""

from __future__ import annotations

import math


def lr_multiplier(done: int, total: int, warmup_fraction: float, final_fraction: float) -> float:
    """Share of the peak rate in the step that makes `done` of `total` steps (or tokens) done: linear warm-up, then a
    cosine to `final_fraction`.

    A function of what is done alone, so that a resumed run and a skipped step cannot shift the schedule.
    """
    warmup = math.ceil(warmup_fraction * total)
    if done <= warmup:
        return done / warmup
    progress = (min(done, total) - warmup) / max(1, total - warmup)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
