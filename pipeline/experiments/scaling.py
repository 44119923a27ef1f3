"""The arithmetic of scaling experiments: Pareto fronts, and a power law with its test on held-out runs.

Does not know where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from pipeline.evaluation.intervals import CONFIDENCE, Estimate

Interval = tuple[float, float]  # low, high


def pareto_front(costs: Sequence[float], accuracies: Sequence[float], *, less_is_better: bool) -> list[bool]:
    """Returns whether each point is on the Pareto front: no other is better in one value and as good in the other."""
    sign = 1 if less_is_better else -1

    def beats(i: int, j: int) -> bool:
        cheaper = sign * (costs[j] - costs[i])
        better = accuracies[i] - accuracies[j]
        return cheaper >= 0 and better >= 0 and (cheaper > 0 or better > 0)

    count = range(len(costs))
    return [not any(beats(i, j) for i in count) for j in count]


@dataclass(frozen=True)
class PowerLaw:
    """loss = exp(constant) x product of factor ** exponent, fitted by least squares in logarithms.

    Attributes:
        factors: factors that varied over the runs.
        exponents: factor -> exponent with its 95 % interval.
        residuals: relative residual of each run.
    """

    factors: tuple[str, ...]
    constant: float
    exponents: dict[str, Estimate]
    residuals: tuple[float, ...]
    _covariance: npt.NDArray[np.float64]
    _freedom: int
    _variance: float

    def predict(self, run: Mapping[str, float]) -> tuple[float, Interval]:
        """Returns the predicted loss of a new run, and its 95 % prediction interval."""
        x = np.array([1.0, *(math.log(run[name]) for name in self.factors)])
        log_loss = self.constant + float(x[1:] @ [self.exponents[name][0] for name in self.factors])
        spread = math.sqrt(self._variance + float(x @ self._covariance @ x))
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, self._freedom)) * spread
        return math.exp(log_loss), (math.exp(log_loss - half), math.exp(log_loss + half))


def fit_power_law(runs: Sequence[Mapping[str, float]], losses: Sequence[float]) -> PowerLaw | None:
    """Fits loss against every factor that varies over the runs; returns None if the runs are too few.

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
        name: Estimate(float(coefficients[i]), float(coefficients[i] - half[i]), float(coefficients[i] + half[i]))
        for i, name in enumerate(factors, start=1)
    }
    return PowerLaw(
        factors, float(coefficients[0]), exponents, tuple(np.expm1(residuals)), covariance, freedom, variance
    )


def held_out_prediction(
    runs: Sequence[Mapping[str, float]], losses: Sequence[float], size: str
) -> list[tuple[float, float, Interval]]:
    """Fits a law to all runs but those of the largest `size`, and predicts these.

    Returns:
        measured loss, predicted loss and interval of each; empty if the smaller runs are too few for a law in `size`.
    """
    largest = max((run[size] for run in runs), default=0.0)
    fitted = [i for i, run in enumerate(runs) if run[size] < largest]
    law = fit_power_law([runs[i] for i in fitted], [losses[i] for i in fitted])
    if law is None or size not in law.factors:
        return []
    # A factor that the law does not contain must have the value at which the law was fitted.
    predicted = [
        i
        for i in range(len(runs))
        if i not in fitted
        and all(runs[i][name] == runs[fitted[0]][name] for name in runs[i] if name != size and name not in law.factors)
    ]
    return [(losses[i], *law.predict(runs[i])) for i in predicted]
