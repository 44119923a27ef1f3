"""MMSU (arXiv 2506.04779): a letter from A to D.

The official scorer takes the first character, or else the last but one ("... is A."), leaves an answer with neither out
of the denominator, and scores an empty answer by the letter of the row before. `official_accuracy` follows it;
`accuracy` counts every question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.benchmarks.base import Item
from pipeline.evaluation.benchmarks.multiple_choice import MultipleChoice, means_answer, text_of

LETTERS = "ABCD"


class Mmsu(MultipleChoice):
    """MMSU: `mmsu*.json` or JSON lines, with the audio beside it."""

    name = "mmsu"
    files = tuple(f"{name}*.{kind}" for name in ("mmsu", "MMSU", "question/mmsu") for kind in ("json", "jsonl"))
    audio_key = "audio_path"
    prediction_keys = ("response",)

    def _item(self, row: Mapping[str, Any]) -> Item:
        keys = [f"choice_{letter.lower()}" for letter in LETTERS]
        texts = ["" if row.get(key) is None else text_of(row, key) for key in keys]
        while texts and not texts[-1]:
            texts.pop()  # a gap stays, so that the letters after it are those of the file
        lettered = zip(LETTERS, texts, strict=False)
        listed = "\n".join(f"{letter}. {text}" for letter, text in lettered if text)
        return Item(
            question_id=text_of(row, "id"),
            audio=self.file.parent / text_of(row, self.audio_key),
            prompt=f"{text_of(row, 'question')}\n{listed}\nAnswer with the letter of the right choice alone.",
            answer=text_of(row, "answer_gt"),
            choices=tuple(texts),
            domain=text_of(row, "category"),
            task=text_of(row, "task_name"),
            row=row,
        )

    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether the answer means the right choice; an answer without a choice is wrong."""
        return means_answer(prediction, item, letters_offered=True)

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
