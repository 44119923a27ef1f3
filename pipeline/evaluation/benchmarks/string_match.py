"""MMAU (arXiv 2410.19168) and MMAR (arXiv 2505.13032): all words of the right choice, no word of a wrong one.

Their scorers skip questions without a prediction. MMAU's README names the key `model_prediction`, its scorer reads
`model_output`: both are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.benchmarks.base import Item
from pipeline.evaluation.benchmarks.multiple_choice import MultipleChoice, means_answer, text_of, texts_of

_WORD = re.compile(r"\w+")


class _StringMatch(MultipleChoice):
    """A benchmark whose official scorer matches words.

    Attributes:
        domain_key, task_key: keys of domain and task in a row.
        withholds_answers: whether the publishers withhold the answers of a part.
    """

    domain_key: str
    task_key = "sub-category"
    withholds_answers = False

    def _item(self, row: Mapping[str, Any]) -> Item:
        choices = texts_of(row, "choices")
        listed = "\n".join(f"- {choice}" for choice in choices)
        return Item(
            question_id=text_of(row, "id"),
            audio=self.file.parent / text_of(row, self.audio_key),
            prompt=f"{text_of(row, 'question')}\nAnswer with one of these, word for word:\n{listed}",
            answer="" if self.withholds_answers and not row.get("answer") else text_of(row, "answer"),
            choices=choices,
            domain=text_of(row, self.domain_key),
            task=text_of(row, self.task_key),
            row=row,
        )

    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether the official scorer counts the answer as correct."""
        return string_match(str(item.row.get("answer") or ""), prediction, item.choices)

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Returns `official_accuracy`, and `choice_accuracy`, which counts an answer that means the right choice.

        They differ where the official scorer wants more than the meaning: it refuses a letter, a word of a wrong choice
        beside the right one, and another spelling of the right one (composed accents, invisible characters).
        """
        answered = [(item, predictions[item.question_id]) for item in self.items if item.question_id in predictions]
        return {
            "official_accuracy": sum(self.is_correct(*pair) for pair in answered) / len(answered),
            "choice_accuracy": sum(means_answer(text, item) for item, text in answered) / len(answered),
        }


class Mmau(_StringMatch):
    """MMAU: `mmau-test*.json`, with the audio beside it."""

    name = "mmau"
    files = ("mmau-test*.json",)
    audio_key = "audio_id"
    as_list = True
    prediction_keys = ("model_output", "model_prediction")
    domain_key = "task"
    withholds_answers = True  # of `mmau-test.json`, which their server scores


class Mmar(_StringMatch):
    """MMAR: `MMAR-meta.json` or JSON lines, with the audio beside it."""

    name = "mmar"
    files = ("MMAR-meta.json", "MMAR-meta.jsonl")
    audio_key = "audio_path"
    prediction_keys = ("answer_prediction",)
    domain_key = "modality"


def string_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Returns whether all words of the answer are in the prediction, and no word that only wrong choices have."""
    predicted, right = _words(prediction), _words(answer)
    wrong = set().union(*map(_words, choices)) - right
    return bool(predicted) and right <= predicted and not predicted & wrong


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
