"""The answers of a sweep that asks questions: each question's trials against its first, and a verdict by one rule.
Computes; `pal report --answers` writes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.evaluation.scoring import bootstrap_ci95
from pipeline.experiments.scaling import CONFIDENCE, paired_differences, pool
from pipeline.experiments.trials import SEED, QuestionConfig, SweepConfig, label_of, trial_name
from pipeline.tracking.reader import TrainedRun

RULE = f"""Each variant is held against the first row of its table, seed by seed and question by question. The
interval of the mean difference ({CONFIDENCE:.0%}) is over seeds (Student's t; the variance of a difference is taken to
be the same for all variants and estimated from all of them, as if they were independent) and over clips (bootstrap by
clip). *Better* and *worse*: the interval does not hold zero. *No difference seen*: it does, which is not to say that
there is none. *The same*: every answer and the validation loss are equal to the last digit. Nothing corrects for the
number of comparisons: of twenty without any difference, one is expected to be called better or worse. The interval of
an accuracy is over its own seeds and clips; of a variant with one seed over clips alone, and says little."""

Correctness = Mapping[str, Sequence[Any]]  # columns question_id, clip_id, correct
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Variant:
    """One row of an answer; what is None was not run, or not measured.

    Attributes:
        runs: seed -> its finished run.
        by_seed: accuracy (0 to 1) of each.
        difference: of the accuracy to the first variant's; None for that itself.
    """

    label: str
    runs: Mapping[int, TrainedRun]
    by_seed: Mapping[int, float]
    accuracy: Interval | None = None
    difference: Interval | None = None
    verdict: str = "not run"

    def mean(self, metric: str) -> float | None:
        values = [run.metrics[metric] for run in self.runs.values() if metric in run.metrics]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Answer:
    """One question of the sweep, on one benchmark."""

    question: QuestionConfig
    variants: Sequence[Variant]

    @property
    def verdict(self) -> str:
        """One sentence: which variants are better, worse, the same, not told apart, or missing."""
        others = sorted(self.variants[1:], key=lambda variant: variant.verdict)
        parts = []
        for verdict, group in itertools.groupby(others, key=lambda variant: variant.verdict):
            parts.append(f"{verdict}: " + "; ".join(variant.label for variant in group))
        return f"Against *{self.variants[0].label}*, " + ". ".join(parts) + "."


def answer(
    sweep: SweepConfig, runs: Sequence[TrainedRun], benchmark: str, correctness_of: Callable[[TrainedRun], Correctness]
) -> list[Answer]:
    """Every question of the sweep, answered as far as its trials are finished.

    Args:
        correctness_of: which questions of the benchmark a run answered right.
    """
    finished = {run.name: run for run in runs if run.status == "FINISHED" and benchmark in run.evaluations}
    correct = {name: correctness_of(run) for name, run in finished.items()}
    answers = [Answer(asked, _variants(asked, sweep.seeds, finished, benchmark)) for asked in sweep.questions or []]
    places = [(a, v) for a, each in enumerate(answers) for v in range(1, len(each.variants)) if _pairs(each, v)]
    compared = [_difference(answers[a].variants[0], answers[a].variants[v], correct) for a, v in places]
    intervals = paired_differences(compared) if compared else []
    found = dict(zip(places, intervals, strict=True))
    return [
        Answer(each.question, [_judged(each, v, found.get((a, v)), correct) for v in range(len(each.variants))])
        for a, each in enumerate(answers)
    ]


def _variants(
    asked: QuestionConfig, seeds: Sequence[int], finished: Mapping[str, TrainedRun], benchmark: str
) -> list[Variant]:
    variants = []
    for settings in asked.runs:
        names = {seed: trial_name({**settings, SEED: seed}) for seed in seeds}
        own = {seed: finished[name] for seed, name in names.items() if name in finished}
        scores = {seed: run.evaluations[benchmark] for seed, run in own.items()}
        pooled = pool([(score["accuracy"], *score["ci95"]) for score in scores.values()]) if scores else None
        by_seed = {seed: score["accuracy"] for seed, score in scores.items()}
        variants.append(Variant(label_of(settings) or "baseline", own, by_seed, pooled))
    return variants


def _pairs(answered: Answer, place: int) -> list[tuple[TrainedRun, TrainedRun]]:
    """The first variant's run and this one's, for each seed that both have."""
    first, other = answered.variants[0].runs, answered.variants[place].runs
    return [(first[seed], other[seed]) for seed in first if seed in other]


def _difference(first: Variant, other: Variant, correct: Mapping[str, Correctness]) -> tuple[list[float], float]:
    """Of each seed, and the half width of the mean's interval over clips."""
    seeds = [seed for seed in first.runs if seed in other.runs]
    right = [[correct[v.runs[seed].name]["correct"] for seed in seeds] for v in (other, first)]
    by_question = np.subtract(*(np.mean(np.array(verdicts, dtype=float), axis=0) for verdicts in right))
    low, high = bootstrap_ci95(by_question, correct[first.runs[seeds[0]].name]["clip_id"])
    return [other.by_seed[seed] - first.by_seed[seed] for seed in seeds], (high - low) / 2


def _judged(answered: Answer, place: int, difference: Interval | None, correct: Mapping[str, Correctness]) -> Variant:
    variant = answered.variants[place]
    if place == 0:
        return replace(variant, verdict="" if variant.runs else "not run")
    if difference is None:
        return variant
    _, low, high = difference
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
    if all(_repeats(*pair, correct) for pair in _pairs(answered, place)):
        verdict = "the same"
    return replace(variant, difference=difference, verdict=verdict)


def _repeats(one: TrainedRun, other: TrainedRun, correct: Mapping[str, Correctness]) -> bool:
    loss = "validation/loss"
    return correct[one.name] == correct[other.name] and one.metrics.get(loss) == other.metrics.get(loss)
