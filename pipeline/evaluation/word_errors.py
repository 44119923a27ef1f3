"""Word error rates of transcriptions, over a whole set, with two published ways to normalise texts.

The plain one drops case and punctuation, in any language. Whisper's `EnglishTextNormalizer` (arXiv 2212.04356, appendix
C) also drops what stands in brackets and hesitations, writes numbers as digits and spells out contractions; it is for
English. transformers ships its rules, but not the table of British spellings, so that "colour" and "color" differ here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.text_forms import canonical
from pipeline.evaluation.intervals import bootstrap_ratio_ci95

if TYPE_CHECKING:
    from pipeline.evaluation.scoring import Prediction

_TASK_WORDS = {"asr", "stt", "transcribe", "transcript", "transcripts", "transcription", "transcriptions"}


def is_transcription(task: str) -> bool:
    """Returns whether a task's name says that its answers are transcripts (`transcription`, `en-asr`, ...)."""
    task_words = set(re.findall(r"[a-z]+", task.lower()))
    return bool(task_words & _TASK_WORDS) or {"speech", "recognition"} <= task_words


def plain_words(text: str) -> list[str]:
    """Returns the words of the canonical form without case and punctuation, except for apostrophes."""
    return re.sub(r"[^\w\s']", " ", canonical(text).lower()).split()


def whisper_english_words(text: str) -> list[str]:
    """Returns the words of Whisper's normalised form for English."""
    words = _whisper_normaliser()(" ".join(text.split())).split()
    return [word for word in words if re.search(r"\w", word)]  # it leaves one of the dots of "..."


NORMALISERS: dict[str, Callable[[str], list[str]]] = {"wer": plain_words, "wer_whisper_english": whisper_english_words}


@lru_cache(maxsize=1)
def _whisper_normaliser() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer  # takes seconds to import

    normaliser: Callable[[str], str] = EnglishTextNormalizer({})
    return normaliser


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Returns the smallest number of substituted, deleted and inserted words between two texts."""
    distances = list(range(len(hypothesis) + 1))
    for row, word in enumerate(reference, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(hypothesis, start=1):
            substituted = diagonal + (word != other)
            diagonal = distances[column]
            distances[column] = min(substituted, distances[column] + 1, distances[column - 1] + 1)
    return distances[-1]


def word_error_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Computes the word error rates of transcriptions: all errors over all reference words.

    Words where the reference has none (silence, or nothing but punctuation) are errors as well.

    Returns:
        for each of `NORMALISERS` the rate by its name, `<name>_ci95` over clips and `<name>_words`, the number of
        reference words; empty without predictions, and without a rate where no reference has a word.
    """
    scores: dict[str, Any] = {}
    clips = [prediction.clip_id for prediction in predictions]
    for name, words_of in NORMALISERS.items() if predictions else ():
        references = [words_of(prediction.answer) for prediction in predictions]
        answers = [words_of(prediction.prediction) for prediction in predictions]
        errors = np.array([word_errors(*pair) for pair in zip(references, answers, strict=True)], np.float64)
        counts = np.array([len(reference) for reference in references], np.float64)
        scores[f"{name}_words"] = int(counts.sum())
        if counts.sum():
            scores[name] = float(errors.sum() / counts.sum())
            scores[f"{name}_ci95"] = list(bootstrap_ratio_ci95(errors, counts, clips))
    return scores


def add_word_errors(scores: dict[str, Any], predictions: Sequence[Prediction], tasks: Collection[str]) -> None:
    """Adds the word error rates of transcriptions to the scores of these predictions, of all together and by task.

    Args:
        tasks: tasks whose answers are transcripts, whatever their names.
    """
    transcripts = [p for p in predictions if p.task in tasks or is_transcription(p.task)]
    scores |= word_error_scores(transcripts)
    for task in {prediction.task for prediction in transcripts}:
        scores["by_task"][task] |= word_error_scores([p for p in transcripts if p.task == task])
