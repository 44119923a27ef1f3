"""Defines the row that every manifest format is converted to, and validates rows."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Turn
from pipeline.core.records import Strict

RowT = TypeVar("RowT", bound=BaseModel)


class AudioSegment(Strict):
    """A sound: a file, or the part of it between two times.

    Attributes:
        start_s, end_s: seconds from the beginning of the file; None means its beginning and its end.
    """

    audio: str
    start_s: float | None = Field(default=None, allow_inf_nan=False)
    end_s: float | None = Field(default=None, allow_inf_nan=False)


class QuestionRow(Strict):
    """A question of a row; without a `question_id` it gets one from the id of the row and its position.

    Attributes:
        system, turns: as of `Question`.
        other_audio: the sounds that the turns name as 1, 2, ...; 0 is the sound of the row.
    """

    question_id: str | None = None
    question: str
    answer: str
    task: str = "unspecified"
    choices: list[str] | None = None
    system: str | None = None
    turns: list[Turn] | None = None
    other_audio: list[AudioSegment] = []


class TextRow(Strict):
    """Questions without audio; `clip_id` identifies the group."""

    clip_id: str
    questions: list[QuestionRow]
    dataset: str = "unspecified"
    domain: str = "unspecified"


class ClipRow(AudioSegment, TextRow):
    """A row of our own format, to which every other format is converted."""


def validate_row(kind: type[RowT], value: Any, location: str) -> RowT:
    """Validates a row.

    Raises:
        UserError: a field is missing, unknown or of the wrong type; names the location and the field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        if first["type"] == "missing":
            raise missing_field(location, field) from error
        raise UserError(location, f"field '{field}': {first['msg'].lower()}", "correct this row") from error


def missing_field(location: str, field: str) -> UserError:
    """Returns the error for a row without a field."""
    return UserError(location, f"row without the field '{field}'", f"add '{field}' to this row")
