"""Answers the questions of a sweep: compares each variant with the first of its question and concludes by a fixed rule.

Computes only; `pipeline.experiments.page` writes the page."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.evaluation.intervals import CONFIDENCE, Estimate, bootstrap_ci95, paired_differences, pool_seeds
from pipeline.experiments.trials import SEED, QuestionConfig, SweepConfig, label_of, trial_name
from pipeline.tracking.reader import TrainedRun

RULE = f"""Each variant is compared with the first row of its table, seed by seed and question by question.
The {CONFIDENCE:.0%} interval of the mean difference covers seeds (Student's t; the variance of a difference is assumed
to be the same for all variants and estimated from all of them, as if they were independent) and clips (bootstrap by
clip). *Better* and *worse*: the interval excludes zero. *No difference seen*: the interval contains zero, which does
not show that there is no difference. *The same*: the correctness of every answer and the validation loss are identical.
There is no correction for multiple comparisons: of twenty comparisons without a difference, one is expected to be
called better or worse. The interval of an accuracy covers its own seeds and clips; with a single seed it covers clips
alone."""

Correctness = Mapping[str, Sequence[Any]]  # columns question_id, clip_id, correct


@dataclass(frozen=True)
class Variant:
    """One row of an answer; None stands for what was not run or not measured.

    Attributes:
        runs: seed -> its finished run.
        by_seed: seed -> accuracy (0 to 1).
        accuracy: accuracy over all seeds.
        difference: difference of the accuracy from that of the first variant; None for the first variant.
        conclusion: better, worse, no difference seen, the same, or not run; empty for the first variant.
    """

    label: str
    runs: Mapping[int, TrainedRun]
    by_seed: Mapping[int, float]
    accuracy: Estimate | None = None
    difference: Estimate | None = None
    conclusion: str = "not run"

    def mean(self, metric: str) -> float | None:
        """Returns the mean of a metric over the runs that have it."""
        values = [run.metrics[metric] for run in self.runs.values() if metric in run.metrics]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Answer:
    """The answer to one question of the sweep, on one benchmark."""

    question: QuestionConfig
    variants: Sequence[Variant]

    @property
    def conclusion(self) -> str:
        """One sentence that groups the variants by their conclusion."""
        others = sorted(self.variants[1:], key=lambda variant: variant.conclusion)
        parts = []
        for conclusion, group in itertools.groupby(others, key=lambda variant: variant.conclusion):
            parts.append(f"{conclusion}: " + "; ".join(variant.label for variant in group))
        return f"Compared with *{self.variants[0].label}*, " + ". ".join(parts) + "."


def answer_questions(
    sweep: SweepConfig,
    runs: Sequence[TrainedRun],
    benchmark: str,
    correctness_of: Callable[[TrainedRun, str], Correctness],
) -> list[Answer]:
    """Answers every question of the sweep, as far as its trials are finished.

    Args:
        correctness_of: returns which questions of a benchmark a run answered correctly.
    """
    finished = {run.name: run for run in runs if run.status == "FINISHED" and benchmark in run.scored}
    correctness = {name: correctness_of(run, benchmark) for name, run in finished.items()}
    answers = [
        Answer(question, _measured_variants(question, sweep.seeds, finished, benchmark))
        for question in sweep.questions or []
    ]
    compared = [
        (a, v)
        for a, answer in enumerate(answers)
        for v in range(1, len(answer.variants))
        if _paired_runs(answer.variants[0], answer.variants[v])
    ]
    comparisons = [_compare(answers[a].variants[0], answers[a].variants[v], correctness) for a, v in compared]
    differences = dict(zip(compared, paired_differences(comparisons) if comparisons else [], strict=True))
    return [
        Answer(
            answer.question,
            [
                _conclude(answer.variants[0], variant, differences.get((a, v)), correctness)
                for v, variant in enumerate(answer.variants)
            ],
        )
        for a, answer in enumerate(answers)
    ]


def _measured_variants(
    question: QuestionConfig, seeds: Sequence[int], finished: Mapping[str, TrainedRun], benchmark: str
) -> list[Variant]:
    """Returns the variants with their accuracies, still without differences and conclusions."""
    variants = []
    for settings in question.runs:
        names = {seed: trial_name({**settings, SEED: seed}) for seed in seeds}
        runs = {seed: finished[name] for seed, name in names.items() if name in finished}
        scores = {seed: run.scored[benchmark] for seed, run in runs.items()}
        pooled = pool_seeds([(score["accuracy"], *score["ci95"]) for score in scores.values()]) if scores else None
        by_seed = {seed: score["accuracy"] for seed, score in scores.items()}
        variants.append(Variant(label_of(settings) or "baseline", runs, by_seed, pooled))
    return variants


def _paired_runs(reference: Variant, variant: Variant) -> list[tuple[TrainedRun, TrainedRun]]:
    """Returns the runs of both variants for each seed that both have."""
    return [(reference.runs[seed], variant.runs[seed]) for seed in reference.runs if seed in variant.runs]


def _compare(reference: Variant, variant: Variant, correctness: Mapping[str, Correctness]) -> tuple[list[float], float]:
    """Returns the difference for each seed, and the half width of the mean's interval over clips."""
    seeds = [seed for seed in reference.runs if seed in variant.runs]
    correct = [[correctness[v.runs[seed].name]["correct"] for seed in seeds] for v in (variant, reference)]
    by_question = np.subtract(*(np.mean(np.array(by_seed, dtype=float), axis=0) for by_seed in correct))
    low, high = bootstrap_ci95(by_question, correctness[reference.runs[seeds[0]].name]["clip_id"])
    return [variant.by_seed[seed] - reference.by_seed[seed] for seed in seeds], (high - low) / 2


def _conclude(
    reference: Variant, variant: Variant, difference: Estimate | None, correctness: Mapping[str, Correctness]
) -> Variant:
    """Returns the variant with its difference and conclusion."""
    if variant is reference:
        return replace(variant, conclusion="" if variant.runs else "not run")
    if difference is None:
        return variant
    conclusion = "better" if difference.low > 0 else "worse" if difference.high < 0 else "no difference seen"
    if all(_are_identical(*pair, correctness) for pair in _paired_runs(reference, variant)):
        conclusion = "the same"
    return replace(variant, difference=difference, conclusion=conclusion)


def _are_identical(run: TrainedRun, other: TrainedRun, correctness: Mapping[str, Correctness]) -> bool:
    loss = "validation/loss"
    return correctness[run.name] == correctness[other.name] and run.metrics.get(loss) == other.metrics.get(loss)
