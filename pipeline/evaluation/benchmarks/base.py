"""A published benchmark: its questions about audio files, its scoring rules, and the file its official scorer reads."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question; `row` is what the benchmark's file says of it. An empty answer: its publishers keep it."""

    question_id: str
    audio: Path
    prompt: str
    answer: str
    choices: tuple[str, ...]
    domain: str
    task: str
    row: Mapping[str, Any]


class Benchmark(ABC):
    """One benchmark in a folder as it is published.

    Args:
        place: the folder, or the file of its questions; audio paths start from the file's folder.

    Attributes:
        file: of its questions.
        items: its questions, in the order of the file.

    Raises:
        UserError: no such file, rows without what is needed, missing audio.
    """

    name: str
    files: Sequence[str]  # patterns of the file of questions in the folder
    remark = ""  # what whoever reads its scores must know

    def __init__(self, place: Path) -> None:
        self.file = place if place.is_file() else self._find(place)
        self.items = self._read()
        if not self.items:
            raise UserError(self.file, "holds no question", f"give {self.name} as it is published")
        missing = [item.audio for item in self.items if not item.audio.is_file()]
        if missing:
            fault = f"{len(missing)} of {len(self.items)} audio files are missing, the first is {missing[0]}"
            raise UserError(self.file, fault, f"put {self.name}'s audio where its publishers do, or remove its rows")

    def _find(self, place: Path) -> Path:
        found = sorted({file for pattern in self.files for file in place.glob(pattern)})
        if len(found) != 1:
            fault = f"holds {len(found)} files named {' or '.join(self.files)}"
            raise UserError(place, fault, f"give the folder or the file of {self.name}'s questions")
        return found[0]

    @abstractmethod
    def _read(self) -> list[Item]:
        """All questions."""

    @abstractmethod
    def is_correct(self, item: Item, prediction: str) -> bool:
        """The verdict on one answer."""

    def marks(self, predictions: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Metric -> question_id -> mark, of metrics that are means of marks.

        Args:
            predictions: question_id -> answer, for at least one question; no other question counts.
        """
        return {}

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Named numbers beside the mean of `correct`; None for one that cannot be computed.

        Args:
            predictions: question_id -> answer, for at least one question; those without one are not counted.
        """
        return {}

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str] | None:
        """Name and text of the file that an official scorer reads; None where there is no such scorer."""
        return None


def words(text: str) -> list[str]:
    """Without case and punctuation."""
    return re.findall(r"\w+", text.casefold())
