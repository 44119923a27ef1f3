"""What benchmarks of several choices have in common: reading rows and files, and the plain reading of an answer."""

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
    """A benchmark with choices, in a file of JSON.

    Raises:
        UserError: as `Benchmark`; or an answer that is not among the choices.
    """

    audio_key: str
    as_list = False  # whether the official scorer reads a JSON list, not JSON lines
    prediction_keys: Sequence[str]  # where the official scorer looks for an answer

    def _read(self) -> list[Item]:
        items = []
        for number, row in enumerate(read_rows(self.file), start=1):
            where = f"{self.file}, question {number}"
            try:
                item = self._item(row)
            except KeyError as error:
                raise UserError(where, f"has no {error.args[0]}", f"give {self.name} as it is published") from error
            if item.answer and item.answer not in item.choices:
                raise UserError(where, f"'{item.answer}' is not among its choices", "correct or remove the question")
            items.append(item)
        return items

    @abstractmethod
    def _item(self, row: Mapping[str, Any]) -> Item:
        """One row; a KeyError names what it lacks."""

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str]:
        """The published rows, with answers."""
        rows = [
            {**item.row, **dict.fromkeys(self.prediction_keys, predictions[item.question_id])}
            for item in self.items
            if item.question_id in predictions
        ]
        if self.as_list:
            return f"{self.name}.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        return f"{self.name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list, or of JSON lines.

    Raises:
        UserError: neither.
    """
    text = file.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows: list[dict[str, Any]] = json.loads(text)
            return rows
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(file, f"is neither a JSON list nor JSON lines ({error})", "fetch it again") from error


def named(prediction: str, choices: Sequence[str]) -> set[int]:
    """Which choices stand in the answer, word for word. `car alarm` is one choice, not also `car`."""
    numbers = {" ".join(words(choice)): number for number, choice in enumerate(choices)}
    longest_first = "|".join(map(re.escape, sorted(numbers, key=len, reverse=True)))
    found = re.findall(rf"(?<!\S)(?:{longest_first})(?!\S)", " ".join(words(prediction)))
    return {numbers[text] for text in found}


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Which choice a reader would say is meant; None where none is, or several are.

    In this order: the text of a choice; a letter in front or alone (`B`, `(b)`, `C. A dog`); `the answer is B`; the one
    choice whose words stand in the answer (of two that contain each other, the longer).
    """
    said = words(prediction)
    same = [number for number, choice in enumerate(choices) if words(choice) == said]
    if len(same) == 1:
        return same[0]
    for match in (_LETTER.match(prediction), _SENTENCE.search(prediction)):
        if match is not None and (number := ord(match[1].upper()) - ord("A")) < len(choices):
            return number
    padded = [f" {' '.join(words(choice))} " for choice in choices]
    there = [number for number, text in enumerate(padded) if text.strip() and text in f" {' '.join(said)} "]
    longest = [n for n in there if not any(n != other and padded[n] in padded[other] for other in there)]
    return longest[0] if len(longest) == 1 else None
