"""The arithmetic of scaling experiments: intervals over seeds and clips, Pareto fronts, a power law and its test on
what it was not fitted to. Knows numbers, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
Interval = tuple[float, float]


def pool(runs: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean accuracy of runs that differ in their seed, with its interval over seeds and clips.

    Seeds vary independently, so their part shrinks with their number (Student's t); all runs answer about the same
    clips, so that part, taken from the runs' own intervals, does not.

    Args:
        runs: accuracy, low and high end of its 95 % interval over clips, each from 0 to 1.
    """
    values = np.array([accuracy for accuracy, _, _ in runs])
    over_clips = float(np.mean([(high - low) / 2 for _, low, high in runs]))
    over_seeds = 0.0
    if len(runs) > 1:
        over_seeds = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(runs) - 1) * values.std(ddof=1) / math.sqrt(len(runs)))
    mean, half = float(values.mean()), math.hypot(over_clips, over_seeds)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def paired_differences(comparisons: Sequence[tuple[Sequence[float], float]]) -> list[tuple[float, float, float]]:
    """Mean differences of variants to their references, with intervals over seeds and clips.

    A few seeds tell little of their own variance, so one is estimated from all comparisons together; where no
    comparison has two seeds the interval is over clips alone.

    Args:
        comparisons: the difference of each seed, and the half width of the mean's 95 % interval over clips.
    """
    freedom = sum(len(differences) - 1 for differences, _ in comparisons)
    squares = sum(float(np.var(differences)) * len(differences) for differences, _ in comparisons)
    spread = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(squares / freedom) if freedom else 0.0
    found = []
    for differences, over_clips in comparisons:
        mean, half = float(np.mean(differences)), math.hypot(spread / math.sqrt(len(differences)), over_clips)
        found.append((mean, mean - half, mean + half))
    return found


def pareto_front(costs: Sequence[float], accuracies: Sequence[float], *, less_is_better: bool) -> list[bool]:
    """Which points no other one beats in one of the two without losing in the other."""
    sign = 1 if less_is_better else -1

    def beats(i: int, j: int) -> bool:
        cheaper = sign * (costs[j] - costs[i])
        better = accuracies[i] - accuracies[j]
        return cheaper >= 0 and better >= 0 and (cheaper > 0 or better > 0)

    count = range(len(costs))
    return [not any(beats(i, j) for i in count) for j in count]


@dataclass(frozen=True)
class PowerLaw:
    """loss = exp(constant) x product of factor ** exponent, by least squares in logarithms.

    Attributes:
        exponents: of each factor that varied: value and 95 % interval.
        residuals: of each run, as shares of its loss.
    """

    factors: tuple[str, ...]
    constant: float
    exponents: dict[str, tuple[float, float, float]]
    residuals: tuple[float, ...]
    _covariance: npt.NDArray[np.float64]
    _freedom: int
    _variance: float

    def predict(self, run: Mapping[str, float]) -> tuple[float, Interval]:
        """The loss of a new run, and the interval that it falls into with 95 % probability if the law holds."""
        x = np.array([1.0, *(math.log(run[name]) for name in self.factors)])
        log_loss = self.constant + float(x[1:] @ [self.exponents[name][0] for name in self.factors])
        spread = math.sqrt(self._variance + float(x @ self._covariance @ x))
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, self._freedom)) * spread
        return math.exp(log_loss), (math.exp(log_loss - half), math.exp(log_loss + half))


def fit_power_law(runs: Sequence[Mapping[str, float]], losses: Sequence[float]) -> PowerLaw | None:
    """Fits loss against every factor that varies over the runs; None where they are too few to tell.

    Args:
        runs: factor -> value above 0, the same factors for all.
    """
    factors = tuple(name for name in runs[0] if len({run[name] for run in runs}) > 1) if runs else ()
    freedom = len(runs) - len(factors) - 1
    x = np.array([[1.0, *(math.log(run[name]) for name in factors)] for run in runs])
    if not factors or freedom < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    y = np.log(np.array(losses))
    coefficients, *_ = np.linalg.lstsq(x, y)
    residuals = y - x @ coefficients
    variance = float(residuals @ residuals) / freedom
    covariance = variance * np.linalg.inv(x.T @ x)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * np.sqrt(np.diag(covariance))
    exponents = {
        name: (float(coefficients[i]), float(coefficients[i] - half[i]), float(coefficients[i] + half[i]))
        for i, name in enumerate(factors, start=1)
    }
    return PowerLaw(
        factors, float(coefficients[0]), exponents, tuple(np.expm1(residuals)), covariance, freedom, variance
    )


def held_out_prediction(
    runs: Sequence[Mapping[str, float]], losses: Sequence[float], size: str
) -> list[tuple[float, float, Interval]]:
    """The law of all runs but those of the largest `size`, tried on these: measured loss, predicted loss, interval.

    Empty where the rest is too little for a law in `size`.
    """
    largest = max((run[size] for run in runs), default=0.0)
    rest = [i for i, run in enumerate(runs) if run[size] < largest]
    law = fit_power_law([runs[i] for i in rest], [losses[i] for i in rest])
    if law is None or size not in law.factors:
        return []
    tested = [
        i
        for i in range(len(runs))
        if i not in rest
        and all(_same(runs, rest, i, name) for name in runs[i] if name != size and name not in law.factors)
    ]
    return [(losses[i], *law.predict(runs[i])) for i in tested]


def _same(runs: Sequence[Mapping[str, float]], rest: Sequence[int], index: int, name: str) -> bool:
    """Whether a factor that the law does not know has the value that it was fitted at."""
    return runs[index][name] == runs[rest[0]][name]
