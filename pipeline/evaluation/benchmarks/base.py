"""A published benchmark: questions about audio files, scoring rules, and the file that its official scorer reads."""

from __future__ import annotations

import csv
import io
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        has_transcripts: whether all answers are transcripts, which have word error rates.
        file: file of the questions.
        items: questions, in the order of the file.

    Raises:
        UserError: no such file, incomplete or repeated rows, missing audio.
    """

    name: str
    files: Sequence[str]
    caveat = ""
    has_transcripts = False

    def __init__(self, location: Path) -> None:
        self.file = location if location.is_file() else self._find(location)
        self.items = self._read()
        if not self.items:
            raise UserError(self.file, "holds no questions", f"give the folder of {self.name} as published")
        repeated = [name for name, count in Counter(item.question_id for item in self.items).items() if count > 1]
        if repeated:
            fault = f"holds {len(repeated)} questions more than once, the first is {repeated[0]}"
            raise UserError(self.file, fault, "remove the copies")
        self.items = [replace(item, audio=_existing(item.audio)) for item in self.items]
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


def _existing(path: Path) -> Path:
    """Returns the path in the Unicode form in which the file exists, since unpacking may compose or decompose names."""
    forms = [path, *(path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD") if path.name)]
    return next((form for form in forms if form.is_file()), path)


def read_text(file: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")  # not as text, which would change the ends of lines in a field
    except UnicodeDecodeError as error:
        raise UserError(file, f"is not UTF-8 ({error})", "download the file again") from error


def read_table(file: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Reads the rows of a CSV with a header, each with its `file:line`. Other columns than the named ones may be empty.

    Raises:
        UserError: the file is no such CSV, lacks a column, or has a row with too many fields or without a value.
    """
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        absent = [column for column in columns if column not in reader.fieldnames]
        if absent:
            remedy = f"give the published file, whose header names {' and '.join(columns)}"
            raise UserError(file, f"has no columns {' and '.join(absent)}", remedy)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                fault = f"has {len(row) - 1 + len(row[None])} fields, the header has {len(reader.fieldnames)}"
                raise UserError(where, fault, 'put quotes around a field that holds a comma ("a dog, barking")')
            empty = [column for column in columns if not (row[column] or "").strip()]
            if empty:
                raise UserError(where, f"has no {' and no '.join(empty)}", "download the file again")
            rows.append((where, {key: value or "" for key, value in row.items()}))
    except csv.Error as error:
        where = f"{file}:{reader.reader.line_num}"
        raise UserError(where, f"is no CSV ({error})", "download the file again") from error
    return rows
