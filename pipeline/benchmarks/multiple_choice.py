"""What benchmarks of several choices have in common: reading rows and files, and the plain reading of an answer."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_LETTER = re.compile(r"\W*([a-z])(?:\W*$|[).:,]\W|\s*-\s)", re.IGNORECASE)
_SENTENCE = re.compile(r"\b(?:answer|option|choice)(?: is)?:?\W*([A-Z])\b(?!\w)")


@dataclass(frozen=True)
class Item:
    """One question; `row` is what the benchmark's file says of it."""

    question_id: str
    audio: Path
    prompt: str
    answer: str
    choices: tuple[str, ...]
    domain: str
    task: str
    row: Mapping[str, Any]


class MultipleChoice(ABC):
    """One benchmark in a folder as it is published.

    Args:
        place: the folder, or the file of its questions; audio paths start from the file's folder.

    Attributes:
        items: its questions, in the order of the file.

    Raises:
        UserError: no such file, rows without what is needed, an answer that is not among the choices, missing audio.
    """

    name: str
    files: Sequence[str]  # patterns of the file of questions in the folder
    audio_key: str
    as_list = False  # whether the official scorer reads a JSON list, not JSON lines
    prediction_keys: Sequence[str]  # where the official scorer looks for an answer

    def __init__(self, place: Path) -> None:
        self.file = self._find(place)
        self.items: list[Item] = []
        for number, row in enumerate(read_rows(self.file), start=1):
            where = f"{self.file}, question {number}"
            try:
                item = self._item(row)
            except KeyError as error:
                raise UserError(where, f"has no {error.args[0]}", f"give {self.name} as it is published") from error
            if item.answer not in item.choices:
                raise UserError(where, f"'{item.answer}' is not among its choices", "correct or remove the question")
            self.items.append(item)
        missing = [item.audio for item in self.items if not item.audio.is_file()]
        if missing:
            fault = f"{len(missing)} of {len(self.items)} audio files are missing, the first is {missing[0]}"
            raise UserError(self.file, fault, f"put {self.name}'s audio beside its questions")

    def _find(self, place: Path) -> Path:
        if place.is_file():
            return place
        found = sorted({file for pattern in self.files for file in place.glob(pattern)})
        if len(found) != 1:
            fault = f"holds {len(found)} files named {' or '.join(self.files)}"
            raise UserError(place, fault, f"give the folder or the file of {self.name}'s questions")
        return found[0]

    @abstractmethod
    def _item(self, row: Mapping[str, Any]) -> Item:
        """One row; a KeyError names what it lacks."""

    @abstractmethod
    def correct(self, item: Item, prediction: str) -> bool:
        """The verdict on one answer."""

    @abstractmethod
    def further(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Named numbers beside the mean of `correct`; None for one that the official scorer fails to compute.

        Args:
            predictions: question_id -> answer, for at least one question; those without one are not counted.
        """

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str]:
        """Name and text of the file that the official scorer reads: the published rows, with answers."""
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


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Which choice a reader would say is meant; None where none is, or several are.

    In this order: the text of a choice; a letter in front or alone (`B`, `(b)`, `C. A dog`); `the answer is B`; the one
    choice whose words stand in the answer (of two that contain each other, the longer).
    """
    said = _words(prediction)
    same = [number for number, choice in enumerate(choices) if _words(choice) == said]
    if len(same) == 1:
        return same[0]
    for match in (_LETTER.match(prediction), _SENTENCE.search(prediction)):
        if match is not None and (number := ord(match[1].upper()) - ord("A")) < len(choices):
            return number
    padded = [f" {' '.join(_words(choice))} " for choice in choices]
    there = [number for number, text in enumerate(padded) if text.strip() and text in f" {' '.join(said)} "]
    longest = [n for n in there if not any(n != other and padded[n] in padded[other] for other in there)]
    return longest[0] if len(longest) == 1 else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
