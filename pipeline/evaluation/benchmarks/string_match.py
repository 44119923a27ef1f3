"""MMAU (arXiv 2410.19168) and MMAR (arXiv 2505.13032): the words of the right choice, and none of a wrong one.

Their scorers leave out questions without an answer. MMAU's README names the key `model_prediction`, its scorer reads
`model_output`: both are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.benchmarks.base import Item
from pipeline.evaluation.benchmarks.multiple_choice import MultipleChoice, chosen

_WORD = re.compile(r"\w+")


class _StringMatch(MultipleChoice):
    domain_key: str
    task_key = "sub-category"
    keeps_answers = False  # whether its publishers keep the answers of a part to themselves

    def _item(self, row: Mapping[str, Any]) -> Item:
        choices = tuple(row["choices"])
        listed = "\n".join(f"- {choice}" for choice in choices)
        return Item(
            question_id=row["id"],
            audio=self.file.parent / row[self.audio_key],
            prompt=f"{row['question']}\nAnswer with one of these, word for word:\n{listed}",
            answer=row.get("answer") or "" if self.keeps_answers else row["answer"],
            choices=choices,
            domain=row[self.domain_key],
            task=row[self.task_key],
            row=row,
        )

    def is_correct(self, item: Item, prediction: str) -> bool:
        """As the official scorer judges."""
        return string_match(item.answer, prediction, item.choices)

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """`official_accuracy`; and `choice_accuracy`: the choice that a reader would say is meant, letters allowed."""
        answered = [(item, predictions[item.question_id]) for item in self.items if item.question_id in predictions]
        meant = [(item, chosen(prediction, item.choices)) for item, prediction in answered]
        return {
            "official_accuracy": sum(self.is_correct(*pair) for pair in answered) / len(answered),
            "choice_accuracy": sum(n is not None and i.choices[n] == i.answer for i, n in meant) / len(answered),
        }


class Mmau(_StringMatch):
    name = "mmau"
    files = ("mmau-test*.json",)
    audio_key = "audio_id"
    as_list = True
    prediction_keys = ("model_output", "model_prediction")
    domain_key = "task"
    keeps_answers = True  # of `mmau-test.json`, which their server scores


class Mmar(_StringMatch):
    name = "mmar"
    files = ("MMAR-meta.json", "MMAR-meta.jsonl")
    audio_key = "audio_path"
    prediction_keys = ("answer_prediction",)
    domain_key = "modality"


def string_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether all words of the answer are in the prediction, and no word that only wrong choices have."""
    said, right = _words(prediction), _words(answer)
    wrong = set().union(*map(_words, choices)) - right
    return bool(said) and right <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
