"""Scores of predictions: accuracy by task and domain, the majority baseline. Needs no model, no files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pipeline.core.choices import means_right_choices, right_choices
from pipeline.core.feature_contract import Question
from pipeline.core.text_forms import exact_match, literal, normalise
from pipeline.evaluation.intervals import bootstrap_ci95

_NOT_WRITTEN = ("benchmark_correct", "choice_question")


@dataclass(frozen=True)
class Prediction:
    """A generated answer and the reference `answer`.

    Attributes:
        truncated: whether the bound on new tokens ended the generated answer.
        benchmark_correct: whether a published benchmark counts the answer as correct; None outside of benchmarks.
        choice_question: the question, if it has choices: an answer is then correct if it means the same choices as the
            reference answer.
    """

    question_id: str
    clip_id: str
    domain: str
    task: str
    question: str
    answer: str
    prediction: str
    truncated: bool = False
    benchmark_correct: bool | None = None
    choice_question: Question | None = None

    @property
    def is_correct(self) -> bool:
        """Whether the answer is correct by the benchmark's own rule, by its choice, or else by exact match."""
        if self.benchmark_correct is not None:
            return self.benchmark_correct
        if self.choice_question is not None and right_choices(self.choice_question):
            return means_right_choices(self.prediction, self.choice_question)
        return exact_match(self.prediction, self.answer)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types: `is_correct` as `correct`, and the choices of a question that has any."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NOT_WRITTEN}
        choices = {} if self.choice_question is None else {"choices": self.choice_question.choices}
        return {**values, **choices, "correct": self.is_correct}


def score(predictions: Sequence[Prediction], seed: int = 0) -> dict[str, Any]:
    """Computes the accuracy (fraction of correct answers, 0 to 1) over all questions, by task and by domain.

    Returns:
        `{accuracy, ci95: [low, high], questions, clips, by_task, by_domain}` as plain JSON; each entry of `by_task`
        and `by_domain` holds the first four again.

    Raises:
        ValueError: no predictions.
    """
    return {
        **_score_group(predictions, seed),
        "by_task": _score_by(predictions, lambda prediction: prediction.task, seed),
        "by_domain": _score_by(predictions, lambda prediction: prediction.domain, seed),
    }


def _score_by(predictions: Sequence[Prediction], key: Callable[[Prediction], str], seed: int) -> dict[str, Any]:
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[key(prediction)].append(prediction)
    return {name: _score_group(groups[name], seed) for name in sorted(groups)}


def _score_group(predictions: Sequence[Prediction], seed: int) -> dict[str, Any]:
    if not predictions:
        raise ValueError("there is nothing to score")
    correct = np.array([prediction.is_correct for prediction in predictions], dtype=np.float64)
    clips = [prediction.clip_id for prediction in predictions]
    return {
        "accuracy": float(correct.mean()),
        "ci95": list(bootstrap_ci95(correct, clips, seed)),
        "questions": len(predictions),
        "clips": len(set(clips)),
    }


class MajorityBaseline:
    """Answers with the most frequent training answer to the same wording of the same task; uses no audio.

    A wording that is not in the training set gets the most frequent answer of its task, a task that is not in it the
    most frequent answer of all. Of equally frequent answers the alphabetically first one is taken.
    """

    def __init__(self, questions: Iterable[tuple[str, str, str]]) -> None:
        """Counts (task, question, answer) triples of the training questions."""
        by_wording: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        by_task: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for task, question, answer in questions:
            normalised = normalise(answer) or literal(answer)
            by_wording[task, normalise(question)][normalised] += 1
            by_task[task][normalised] += 1
            overall[normalised] += 1
        self._by_wording = {key: _majority(counts) for key, counts in by_wording.items()}
        self._by_task = {task: _majority(counts) for task, counts in by_task.items()}
        self._overall = _majority(overall) if overall else ""

    def predict(self, task: str, question: str) -> str:
        """Returns the answer to a question; empty if there were no training questions."""
        return self._by_wording.get((task, normalise(question)), self._by_task.get(task, self._overall))


def _majority(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
