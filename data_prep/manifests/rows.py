"""The shape of a manifest row, and how rows with a question each become clips with all theirs."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core.errors import UserError

RowT = TypeVar("RowT", bound=BaseModel)


class QuestionRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question_id: str | None = None
    question: str
    answer: str
    task: str = "unspecified"
    choices: list[str] | None = None


class TextRow(BaseModel):
    """Questions about no clip, under an id of their own."""

    model_config = ConfigDict(extra="forbid")

    clip_id: str
    questions: list[QuestionRow]
    dataset: str = "unspecified"
    domain: str = "unspecified"


class ClipRow(TextRow):
    """Our own format, and what every other one is turned into."""

    audio: str


def group_by_clip(rows: Iterable[ClipRow]) -> Iterator[ClipRow]:
    """Joins rows of the same clip: clips by first appearance, questions in their order.

    Rows wait in a temporary database on disk: the largest corpora have millions of questions, in any order.
    """
    numbers: dict[str, int] = {}
    database = sqlite3.connect("")
    try:
        database.execute("CREATE TABLE waiting (clip INTEGER, row TEXT)")
        values = ((numbers.setdefault(row.clip_id, len(numbers)), row.model_dump_json()) for row in rows)
        database.executemany("INSERT INTO waiting VALUES (?, ?)", values)
        ordered = database.execute("SELECT clip, row FROM waiting ORDER BY clip, rowid")
        for _, group in itertools.groupby(ordered, key=lambda pair: pair[0]):
            first, *others = (ClipRow.model_validate_json(text) for _, text in group)
            yield first.model_copy(update={"questions": [q for row in (first, *others) for q in row.questions]})
    finally:
        database.close()


def parse_json(text: str, place: str) -> Any:
    """Raises UserError with the place of text that is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(place, f"bad JSON ({error.msg})", "correct this row") from error


def validate_row(kind: type[RowT], value: Any, place: str) -> RowT:
    """Raises UserError with the place and the field at fault."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        if first["type"] == "missing":
            raise missing_field(place, field) from error
        raise UserError(place, f"field '{field}': {first['msg'].lower()}", "correct this row") from error


def missing_field(place: str, field: str) -> UserError:
    return UserError(place, f"row without the field '{field}'", f"add '{field}' to this row")
