"""Intervals are over clips and seeds, and cover the truth as often as they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.intervals import bootstrap_ci95, paired_differences, pool_seeds


def test_bootstrap_counts_clips_not_questions() -> None:
    """Ten questions with the same outcome for every clip add no evidence, so the interval must not shrink."""
    correct = np.random.default_rng(0).random(100) < 0.7
    clips = [f"c{i}" for i in range(100)]
    once = bootstrap_ci95(correct.astype(float), clips)
    tenfold = bootstrap_ci95(np.repeat(correct.astype(float), 10), [c for c in clips for _ in range(10)])
    assert once == pytest.approx(tenfold)
    binomial_width = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert once[1] - once[0] == pytest.approx(binomial_width, rel=0.25)


def test_bootstrap_covers_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = (rng.random(80) < 0.6).astype(float)
        low, high = bootstrap_ci95(values, [str(i) for i in range(80)], seed=trial)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_bootstrap_does_not_depend_on_the_order_of_values() -> None:
    rng = np.random.default_rng(1)
    values, clips = rng.random(60), [f"c{number % 17}" for number in range(60)]
    order = rng.permutation(60)
    assert bootstrap_ci95(values[order], [clips[index] for index in order]) == pytest.approx(
        bootstrap_ci95(values, clips), abs=1e-12
    )


def test_bootstrap_draws_whole_clips() -> None:
    """Two clips, one right and one wrong: a resample holds one of them or both."""
    values = np.array([1.0, 1.0, 0.0, 0.0])
    assert bootstrap_ci95(values, ["a", "a", "b", "b"]) == (0.0, 1.0)
    assert bootstrap_ci95(values, ["a"] * 4) == (0.5, 0.5), "one clip tells nothing about clips"


def test_one_run_keeps_its_interval_and_seeds_widen_it() -> None:
    assert pool_seeds([(0.8, 0.75, 0.85)]) == pytest.approx((0.8, 0.75, 0.85))
    mean, low, high = pool_seeds([(0.78, 0.73, 0.83), (0.8, 0.75, 0.85), (0.82, 0.77, 0.87)])
    assert mean == pytest.approx(0.8) and 0.06 < high - mean < 0.08 and mean - low == pytest.approx(high - mean)
    same = pool_seeds([(0.8, 0.75, 0.85)] * 3)
    assert same == pytest.approx((0.8, 0.75, 0.85)), "more seeds do not make more clips"


def test_differences_share_the_variance_of_seeds() -> None:
    steady, noisy, single = paired_differences([([0.1] * 3, 0.0), ([0.0, 0.1, 0.2], 0.0), ([0.3], 0.0)])
    assert steady[2] - steady[1] == pytest.approx(noisy[2] - noisy[1]) and steady[0] == pytest.approx(0.1)
    assert single[2] - single[1] == pytest.approx(math.sqrt(3) * (steady[2] - steady[1]))  # a third of the seeds
    ((mean, low, high),) = paired_differences([([0.1], 0.05)])
    assert (mean, low, high) == pytest.approx((0.1, 0.05, 0.15)), "one seed tells nothing about seeds"


def test_intervals_of_differences_cover_the_truth() -> None:
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        estimates = paired_differences([(list(draw.normal(0.0, 0.05, 3)), 0.0) for _ in range(5)])
        covered += sum(low <= 0 <= high for _, low, high in estimates)
    assert 0.93 < covered / 2000 < 0.97
