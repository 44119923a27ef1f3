"""95 % intervals of accuracies and of their differences: over clips by bootstrap, over seeds by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 1000
_VALUES_PER_BATCH = 1_000_000  # resampled clips held in memory at a time


class Estimate(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap_ci95(values: npt.NDArray[np.float64], clips: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % percentile interval of the mean of `values` (n,), resampled by clip.

    Answers about the same clip are correlated, so whole clips are drawn, not questions (a cluster bootstrap). The
    interval has no width where all values are equal, or where there is one clip.

    Args:
        clips: the clip of each value; the order of the values does not matter.
        seed: random seed of the resampling.
    """
    return bootstrap_ratio_ci95(values, np.ones(len(values)), clips, seed)


def bootstrap_ratio_ci95(
    numerators: npt.NDArray[np.float64], denominators: npt.NDArray[np.float64], clips: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """Returns the interval of `bootstrap_ci95` for the ratio of two sums, such as errors over words.

    Args:
        denominators: none is negative, and their sum is positive.
    """
    from scipy import stats  # takes a second to import, which `--help` must not

    names, clip_of_value = np.unique(np.asarray(clips), return_inverse=True)
    sums = np.bincount(clip_of_value, weights=numerators)
    counts = np.bincount(clip_of_value, weights=denominators)
    if len(names) == 1:  # scipy needs two
        mean = float(sums[0] / counts[0])
        return mean, mean

    def mean_of_clips(sums: npt.NDArray[Any], counts: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
        # A sample of clips may hold no word; a count of questions is never below one.
        mean: npt.NDArray[Any] = sums.sum(axis) / np.maximum(counts.sum(axis), 1)
        return mean

    low, high = stats.bootstrap(
        (sums, counts),
        mean_of_clips,
        paired=True,
        vectorized=True,
        n_resamples=BOOTSTRAP_SAMPLES,
        batch=max(1, _VALUES_PER_BATCH // len(names)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(low), float(high)


def pool_seeds(runs: Sequence[tuple[float, float, float]]) -> Estimate:
    """Returns the mean accuracy of runs that differ only in their seed, with its interval over seeds and clips.

    Seeds vary independently, so their contribution shrinks with their number (Student's t). All runs answer questions
    about the same clips, so the contribution of the clips, taken from the runs' own intervals, does not shrink.

    Args:
        runs: accuracy, low and high end of its 95 % interval over clips, each from 0 to 1.
    """
    from scipy import stats

    values = np.array([accuracy for accuracy, _, _ in runs])
    over_clips = float(np.mean([(high - low) / 2 for _, low, high in runs]))
    over_seeds = 0.0
    if len(runs) > 1:
        over_seeds = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(runs) - 1) * values.std(ddof=1) / math.sqrt(len(runs)))
    mean, half_width = float(values.mean()), math.hypot(over_clips, over_seeds)
    return Estimate(mean, max(0.0, mean - half_width), min(1.0, mean + half_width))


def paired_differences(comparisons: Sequence[tuple[Sequence[float], float]]) -> list[Estimate]:
    """Returns the mean difference of each variant from its reference, with intervals over seeds and clips.

    A few seeds are too few to estimate a variance, so one variance is estimated from all comparisons together. Where no
    comparison has two seeds, the interval is over clips alone.

    Args:
        comparisons: the difference for each seed, and the half width of the mean's 95 % interval over clips.
    """
    from scipy import stats

    freedom = sum(len(differences) - 1 for differences, _ in comparisons)
    squares = sum(float(np.var(differences)) * len(differences) for differences, _ in comparisons)
    spread = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(squares / freedom) if freedom else 0.0
    estimates = []
    for differences, over_clips in comparisons:
        mean, half_width = float(np.mean(differences)), math.hypot(spread / math.sqrt(len(differences)), over_clips)
        estimates.append(Estimate(mean, mean - half_width, mean + half_width))
    return estimates
