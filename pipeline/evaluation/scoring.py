"""From answers to numbers: exact match, bootstrap intervals, the commonest-answer baseline. No model, no files."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BOOTSTRAP_SAMPLES = 1000
MEANINGFUL_PUNCTUATION = "#%&@"  # "C#" is not "C", "5%" is not "5"
NUMBER_MARK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\S)[-+](?=\d)")  # 3.5, 4:30, 3/4, -2 keep theirs


@dataclass(frozen=True)
class Prediction:
    """One generated answer beside the right `answer`; benchmarks with rules of their own set `benchmark_correct`."""

    question_id: str
    clip_id: str
    domain: str
    task: str
    question: str
    answer: str
    prediction: str
    benchmark_correct: bool | None = None

    @property
    def is_correct(self) -> bool:
        return exact_match(self.prediction, self.answer) if self.benchmark_correct is None else self.benchmark_correct

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, the benchmark_correct included."""
        return {**{k: v for k, v in asdict(self).items() if k != "benchmark_correct"}, "correct": self.is_correct}


def normalise(text: str) -> str:
    """The form in which answers are compared.

    Unicode compatibility form (NFKC), case folded; apostrophes are dropped, every other punctuation mark counts as
    a space, runs of white space as one. Marks that belong to a number (`3.5`, `4:30`, `-2`) and those that change a
    meaning (`C#`, `5%`) stay.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("−", "-")
    kept = {match.start() for match in NUMBER_MARK.finditer(text)}
    characters = [
        character if index in kept or character in MEANINGFUL_PUNCTUATION else _unpunctuated(character)
        for index, character in enumerate(text)
    ]
    return " ".join("".join(characters).split())


def _unpunctuated(character: str) -> str:
    if character == "'":
        return ""
    return " " if unicodedata.category(character).startswith("P") else character


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both say the same, after `normalise`."""
    return normalise(prediction) == normalise(answer)


def score(predictions: Sequence[Prediction], seed: int = 0) -> dict[str, Any]:
    """Accuracy (share of exact matches, 0 to 1) over all questions, by task and by domain.

    Returns:
        `{accuracy, ci95: [low, high], questions, clips, by_task, by_domain}`; each entry of `by_task` and
        `by_domain` holds the first four again. Everything is plain JSON.

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
    verdicts = np.array([prediction.is_correct for prediction in predictions], dtype=np.float64)
    clips = [prediction.clip_id for prediction in predictions]
    return {
        "accuracy": float(verdicts.mean()),
        "ci95": list(bootstrap_ci95(verdicts, clips, seed)),
        "questions": len(predictions),
        "clips": len(set(clips)),
    }


def bootstrap_ci95(values: npt.NDArray[np.float64], clips: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (n,), resampled by clip.

    Questions about one clip stand or fall together, so whole clips are drawn, not questions (a cluster bootstrap):
    the interval is wider, and honest. It has no width where all values are equal.

    Args:
        clips: the clip of each value; the order of the values does not matter.
    """
    names, clip_of_value = np.unique(np.asarray(clips), return_inverse=True)
    sums = np.bincount(clip_of_value, weights=values)
    counts = np.bincount(clip_of_value)
    rng = np.random.default_rng(seed)
    means = np.empty(BOOTSTRAP_SAMPLES)
    for sample in range(BOOTSTRAP_SAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class MajorityBaseline:
    """What one can answer without listening: the commonest training answer to the same wording of the same task.

    An unknown wording gets the commonest answer of its task, an unknown task the commonest of all. Ties go to the
    alphabetically first answer.
    """

    def __init__(self, questions: Iterable[tuple[str, str, str]]) -> None:
        """Counts (task, question, answer) triples of the training questions."""
        by_wording: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        by_task: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for task, question, answer in questions:
            normalised = normalise(answer)
            by_wording[task, normalise(question)][normalised] += 1
            by_task[task][normalised] += 1
            overall[normalised] += 1
        self._by_wording = {key: _majority(counts) for key, counts in by_wording.items()}
        self._by_task = {task: _majority(counts) for task, counts in by_task.items()}
        self._overall = _majority(overall) if overall else ""

    def __call__(self, task: str, question: str) -> str:
        return self._by_wording.get((task, normalise(question)), self._by_task.get(task, self._overall))


def _majority(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
