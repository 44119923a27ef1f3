"""MMSU (arXiv 2506.04779): a letter from A to D.

The official scorer takes the first character, or else the last but one ("... is A."), leaves an answer with neither out
of the denominator, and scores an empty answer by the letter of the row before. `official_accuracy` follows it;
`accuracy` counts every question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.benchmarks.base import Item
from pipeline.evaluation.benchmarks.multiple_choice import MultipleChoice, chosen

LETTERS = "ABCD"


class Mmsu(MultipleChoice):
    """MMSU: `mmsu*.json` or JSON lines, with the audio beside it."""

    name = "mmsu"
    files = ("mmsu*.json*", "MMSU*.json*", "question/mmsu*.json*")
    audio_key = "audio_path"
    prediction_keys = ("response",)

    def _item(self, row: Mapping[str, Any]) -> Item:
        choices = tuple(row[f"choice_{letter.lower()}"] for letter in LETTERS if row.get(f"choice_{letter.lower()}"))
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        return Item(
            question_id=str(row["id"]),
            audio=self.file.parent / row[self.audio_key],
            prompt=f"{row['question']}\n{listed}\nAnswer with the letter of the right choice alone.",
            answer=row["answer_gt"],
            choices=choices,
            domain=row["category"],
            task=row["task_name"],
            row=row,
        )

    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether the answer means the right choice; an answer without a choice is wrong."""
        number = chosen(prediction, item.choices)
        return number is not None and item.choices[number] == item.answer

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Returns `official_accuracy`, over the `official_questions` that the official scorer counts."""
        correct = counted = 0
        letter = None
        for item in self.items:
            if item.question_id not in predictions:
                continue
            text = predictions[item.question_id].strip().replace("\n", "")
            if text and text != "None":
                letters = [text[index] for index in (0, -2) if len(text) >= -index and text[index] in LETTERS]
                if not letters:
                    continue
                letter = letters[0]
            elif letter is None:  # the official scorer fails here
                return {"official_accuracy": None, "official_questions": None}
            counted += 1
            correct += item.row.get(f"choice_{str(letter).lower()}", "") == item.row["answer_gt"]
        return {"official_accuracy": correct / counted if counted else 0.0, "official_questions": float(counted)}
