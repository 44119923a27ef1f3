"""A published benchmark: questions about audio files, scoring rules, and the file that its official scorer reads."""

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
    """One question.

    Attributes:
        answer: reference answer; empty where the publishers withhold it.
        row: the question's entry in the benchmark's file.
    """

    question_id: str
    audio: Path
    prompt: str
    answer: str
    choices: tuple[str, ...]
    domain: str
    task: str
    row: Mapping[str, Any]


class Benchmark(ABC):
    """A benchmark in a folder, laid out as it is published.

    Args:
        location: folder, or file of the questions; audio paths are relative to the file's folder.

    Attributes:
        name: name of the benchmark on the command line.
        files: patterns of the questions' file in the folder.
        caveat: limitation of the scores that their reader must know; empty if there is none.
        file: file of the questions.
        items: questions, in the order of the file.

    Raises:
        UserError: no such file, incomplete rows, missing audio.
    """

    name: str
    files: Sequence[str]
    caveat = ""

    def __init__(self, location: Path) -> None:
        self.file = location if location.is_file() else self._find(location)
        self.items = self._read()
        if not self.items:
            raise UserError(self.file, "holds no questions", f"give the folder of {self.name} as published")
        missing = [item.audio for item in self.items if not item.audio.is_file()]
        if missing:
            fault = f"{len(missing)} of {len(self.items)} audio files are missing, the first is {missing[0]}"
            raise UserError(
                self.file, fault, f"put the audio where {self.name}'s publishers put it, or remove its rows"
            )

    def _find(self, folder: Path) -> Path:
        matches = sorted({file for pattern in self.files for file in folder.glob(pattern)})
        if len(matches) != 1:
            fault = f"holds {len(matches)} files named {' or '.join(self.files)}"
            raise UserError(folder, fault, f"give the folder or the file of {self.name}'s questions")
        return matches[0]

    @abstractmethod
    def _read(self) -> list[Item]:
        """Reads all questions."""

    @abstractmethod
    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether an answer counts as correct by the benchmark's rule."""

    def question_scores(self, predictions: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Returns metric -> question_id -> score, for metrics that are means over questions.

        Args:
            predictions: question_id -> answer, for at least one question; other questions do not count.
        """
        return {}

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Returns metrics beside accuracy; None for a metric that cannot be computed.

        Args:
            predictions: question_id -> answer, for at least one question; other questions do not count.
        """
        return {}

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str] | None:
        """Returns name and text of the file that the official scorer reads; None where there is no such scorer."""
        return None


def words(text: str) -> list[str]:
    """Returns the words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())
