"""The learning-rate schedule: linear warm-up, then a cosine."""

from __future__ import annotations

import math


def lr_multiplier(done: int, total: int, warmup_fraction: float, final_fraction: float) -> float:
    """Returns the rate, as a fraction of its peak, of the step that completes `done` of `total` steps (or tokens).

    Warms up linearly, then falls along a cosine to `final_fraction`. Depends on nothing but progress, so that neither a
    resume nor a skipped step can shift the schedule.
    """
    warmup = math.ceil(warmup_fraction * total)
    if done <= warmup:
        return done / warmup
    progress = (min(done, total) - warmup) / max(1, total - warmup)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
