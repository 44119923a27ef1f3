"""Fronts hold the points that no other point beats; power laws are recovered and tested on unseen runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.experiments.scaling import fit_power_law, held_out_prediction, pareto_front

SIZES = (1e6, 2e6, 4e6, 8e6)
TOKENS = (1e5, 3e5)


def experiment(noise: float, seed: int = 0) -> tuple[list[dict[str, float]], list[float]]:
    """Returns runs with loss = 50 parameters ** -0.2 tokens ** -0.1, three seeds each, and their losses."""
    draw = np.random.default_rng(seed)
    runs = [{"parameters": n, "text_tokens": d} for n in SIZES for d in TOKENS for _ in range(3)]
    exact = (50 * run["parameters"] ** -0.2 * run["text_tokens"] ** -0.1 for run in runs)
    return runs, [loss * math.exp(noise * draw.standard_normal()) for loss in exact]


def test_a_front_holds_exactly_the_unbeaten_points() -> None:
    costs, accuracies = [1.0, 2.0, 3.0, 2.5], [0.5, 0.7, 0.8, 0.6]
    assert pareto_front(costs, accuracies, less_is_better=True) == [True, True, True, False]
    assert pareto_front(costs, accuracies, less_is_better=False) == [False, False, True, False]
    assert pareto_front([1.0, 1.0], [0.5, 0.5], less_is_better=True) == [True, True]


def test_a_known_law_is_recovered() -> None:
    law = fit_power_law(*experiment(0.0))
    assert law is not None and law.factors == ("parameters", "text_tokens")
    assert [law.exponents[name][0] for name in law.factors] == pytest.approx([-0.2, -0.1])
    noisy = fit_power_law(*experiment(0.01))
    assert noisy is not None
    value, low, high = noisy.exponents["parameters"]
    assert low < -0.2 < high and low < value < high


def test_prediction_intervals_cover_new_runs() -> None:
    inside = []
    for seed in range(100):
        runs, losses = experiment(0.02, seed)
        inside += [
            low <= measured <= high for measured, _, (low, high) in held_out_prediction(runs, losses, "parameters")
        ]
    assert len(inside) == 600 and 0.9 < np.mean(inside) < 0.99


def test_the_prediction_of_the_largest_size_does_not_use_it() -> None:
    runs, losses = experiment(0.0)
    broken = [loss * (2 if run["parameters"] == SIZES[-1] else 1) for run, loss in zip(runs, losses, strict=True)]
    tested = held_out_prediction(runs, broken, "parameters")
    assert [measured / predicted for measured, predicted, _ in tested] == pytest.approx([2.0] * 6)


@pytest.mark.parametrize("runs", [[], [{"parameters": 1.0}], [{"parameters": 1.0}, {"parameters": 2.0}]])
def test_too_few_runs_give_no_law(runs: list[dict[str, float]]) -> None:
    assert fit_power_law(runs, [1.0] * len(runs)) is None
    assert held_out_prediction(runs, [1.0] * len(runs), "parameters") == []
