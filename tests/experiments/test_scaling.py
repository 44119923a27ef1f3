"""Intervals cover what they say, fronts hold what nothing beats, laws are found again and tested on unseen runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.experiments.scaling import fit_power_law, held_out_prediction, paired_differences, pareto_front, pool

SIZES = (1e6, 2e6, 4e6, 8e6)
TOKENS = (1e5, 3e5)


def experiment(noise: float, seed: int = 0) -> tuple[list[dict[str, float]], list[float]]:
    """loss = 50 parameters ** -0.2 tokens ** -0.1, three seeds each."""
    draw = np.random.default_rng(seed)
    runs = [{"parameters": n, "text_tokens": d} for n in SIZES for d in TOKENS for _ in range(3)]
    exact = (50 * run["parameters"] ** -0.2 * run["text_tokens"] ** -0.1 for run in runs)
    return runs, [loss * math.exp(noise * draw.standard_normal()) for loss in exact]


def test_one_run_keeps_its_interval_and_seeds_widen_it() -> None:
    assert pool([(0.8, 0.75, 0.85)]) == pytest.approx((0.8, 0.75, 0.85))
    mean, low, high = pool([(0.78, 0.73, 0.83), (0.8, 0.75, 0.85), (0.82, 0.77, 0.87)])
    assert mean == pytest.approx(0.8) and 0.06 < high - mean < 0.08 and mean - low == pytest.approx(high - mean)
    same = pool([(0.8, 0.75, 0.85)] * 3)
    assert same == pytest.approx((0.8, 0.75, 0.85)), "clips do not become more by asking about them again"


def test_front_holds_exactly_what_nothing_beats() -> None:
    costs, accuracies = [1.0, 2.0, 3.0, 2.5], [0.5, 0.7, 0.8, 0.6]
    assert pareto_front(costs, accuracies, less_is_better=True) == [True, True, True, False]
    assert pareto_front(costs, accuracies, less_is_better=False) == [False, False, True, False]
    assert pareto_front([1.0, 1.0], [0.5, 0.5], less_is_better=True) == [True, True]


def test_a_law_is_found_again() -> None:
    law = fit_power_law(*experiment(0.0))
    assert law is not None and law.factors == ("parameters", "text_tokens")
    assert [law.exponents[name][0] for name in law.factors] == pytest.approx([-0.2, -0.1])
    noisy = fit_power_law(*experiment(0.01))
    assert noisy is not None
    value, low, high = noisy.exponents["parameters"]
    assert low < -0.2 < high and low < value < high


def test_intervals_cover_new_runs_as_often_as_they_say() -> None:
    inside = []
    for seed in range(100):
        runs, losses = experiment(0.02, seed)
        inside += [
            low <= measured <= high for measured, _, (low, high) in held_out_prediction(runs, losses, "parameters")
        ]
    assert len(inside) == 600 and 0.9 < np.mean(inside) < 0.99


def test_the_largest_size_is_not_seen_by_its_own_prediction() -> None:
    runs, losses = experiment(0.0)
    broken = [loss * (2 if run["parameters"] == SIZES[-1] else 1) for run, loss in zip(runs, losses, strict=True)]
    tested = held_out_prediction(runs, broken, "parameters")
    assert [measured / predicted for measured, predicted, _ in tested] == pytest.approx([2.0] * 6)


@pytest.mark.parametrize("runs", [[], [{"parameters": 1.0}], [{"parameters": 1.0}, {"parameters": 2.0}]])
def test_too_few_runs_give_no_law(runs: list[dict[str, float]]) -> None:
    assert fit_power_law(runs, [1.0] * len(runs)) is None
    assert held_out_prediction(runs, [1.0] * len(runs), "parameters") == []


def test_differences_share_the_variance_of_seeds() -> None:
    steady, shaken, lone = paired_differences([([0.1] * 3, 0.0), ([0.0, 0.1, 0.2], 0.0), ([0.3], 0.0)])
    assert steady[2] - steady[1] == pytest.approx(shaken[2] - shaken[1]) and steady[0] == pytest.approx(0.1)
    assert lone[2] - lone[1] == pytest.approx(math.sqrt(3) * (steady[2] - steady[1]))  # a third of the seeds
    ((mean, low, high),) = paired_differences([([0.1], 0.05)])
    assert (mean, low, high) == pytest.approx((0.1, 0.05, 0.15)), "one seed tells nothing of seeds"


def test_intervals_of_differences_cover_the_truth() -> None:
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        found = paired_differences([(list(draw.normal(0.0, 0.05, 3)), 0.0) for _ in range(5)])
        covered += sum(low <= 0 <= high for _, low, high in found)
    assert 0.93 < covered / 2000 < 0.97
