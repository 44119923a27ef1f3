"""Multiple-choice benchmarks: reading their files, and finding the choice that an answer means."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.evaluation.benchmarks.base import Benchmark, Item, words

_LETTER = re.compile(r"\W*([a-z])(?:\W*$|[).:,]\W|\s*-\s)", re.IGNORECASE)
_SENTENCE = re.compile(r"\b(?:answer|option|choice)(?: is)?:?\W*([A-Z])\b(?!\w)")


class MultipleChoice(Benchmark):
    """A benchmark with choices, in a JSON file.

    Attributes:
        audio_key: key of the audio path in a row.
        as_list: whether the official scorer reads a JSON list instead of JSON lines.
        prediction_keys: keys at which the official scorer expects the prediction.

    Raises:
        UserError: as `Benchmark`; or an answer that is not among the choices.
    """

    audio_key: str
    as_list = False
    prediction_keys: Sequence[str]

    def _read(self) -> list[Item]:
        items = []
        for number, row in enumerate(read_rows(self.file), start=1):
            where = f"{self.file}, question {number}"
            try:
                item = self._item(row)
            except KeyError as error:
                raise UserError(
                    where, f"has no {error.args[0]}", f"give the file of {self.name} as published"
                ) from error
            if item.answer and item.answer not in item.choices:
                raise UserError(where, f"'{item.answer}' is not among its choices", "correct or remove the question")
            items.append(item)
        return items

    @abstractmethod
    def _item(self, row: Mapping[str, Any]) -> Item:
        """Returns the item of one row; raises KeyError with the name of a missing key."""

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str]:
        """Returns the published rows with predictions."""
        rows = [
            {**item.row, **dict.fromkeys(self.prediction_keys, predictions[item.question_id])}
            for item in self.items
            if item.question_id in predictions
        ]
        if self.as_list:
            return f"{self.name}.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        return f"{self.name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSON list, or of JSON lines.

    Raises:
        UserError: the file is neither.
    """
    text = file.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows: list[dict[str, Any]] = json.loads(text)
            return rows
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(file, f"is neither a JSON list nor JSON lines ({error})", "download the file again") from error


def named(prediction: str, choices: Sequence[str]) -> set[int]:
    """Returns the choices that occur in the answer, word for word; `car alarm` does not count as `car` too."""
    numbers = {" ".join(words(choice)): number for number, choice in enumerate(choices)}
    longest_first = "|".join(map(re.escape, sorted(numbers, key=len, reverse=True)))
    matches = re.findall(rf"(?<!\S)(?:{longest_first})(?!\S)", " ".join(words(prediction)))
    return {numbers[text] for text in matches}


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Returns the choice that an answer means; None where it means no choice, or several.

    Tried in this order: the text of a choice; a letter alone or at the start (`B`, `(b)`, `C. A dog`); `the answer is
    B`; the one choice whose words occur in the answer (of two that contain each other, the longer one).
    """
    answer = words(prediction)
    equal = [number for number, choice in enumerate(choices) if words(choice) == answer]
    if len(equal) == 1:
        return equal[0]
    for match in (_LETTER.match(prediction), _SENTENCE.search(prediction)):
        if match is not None and (number := ord(match[1].upper()) - ord("A")) < len(choices):
            return number
    padded = [f" {' '.join(words(choice))} " for choice in choices]
    contained = [number for number, text in enumerate(padded) if text.strip() and text in f" {' '.join(answer)} "]
    longest = [n for n in contained if not any(n != other and padded[n] in padded[other] for other in contained)]
    return longest[0] if len(longest) == 1 else None
