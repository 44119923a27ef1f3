"""Makes rows from the fields of a table with the templates of `TableConfig`."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.audio.fragments import with_fragment
from data_prep.config import TableConfig
from data_prep.manifests.clips import RejectedRow
from data_prep.manifests.rows import ClipRow, QuestionRow, missing_field
from pipeline.core.errors import UserError


class _EmptyField(Exception):
    """A template names a field that is empty in this row."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        location: file and line, row or member, for error messages; the id of the row when it is rejected.
        clip_id: id of the clip where `table.clip_id` has no template; None means the path of the audio.
        choices: choices of all questions of the row.
    """

    fields: Mapping[str, Any]
    location: str
    clip_id: str | None = None
    choices: list[str] | None = None


def fill_row(row: TableRow, table: TableConfig) -> ClipRow | RejectedRow:
    """Returns the row with its question and answers, rejected if a field that a template names is empty.

    Raises:
        UserError: `table.question` is not set, a field is missing, a field is a list, an object or bytes, or a time is
            no number.
    """
    if table.question is None:
        raise UserError(
            "table.question", f"is not set, and {row.location} has no question", "give the question of all rows"
        )
    formatter = _Formatter(row.location)

    def fill(template: str) -> str:
        try:
            return formatter.vformat(template, (), row.fields)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise missing_field(row.location, str(error.args[0])) from error

    def seconds(key: str, template: str | None) -> float | None:
        if template is None:
            return None
        text = fill(template)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(row.location, f"`table.{key}` is '{text}' here, not a number", "give it in seconds")
        return value

    try:
        audio = fill(table.audio)
    except _EmptyField as empty:
        return _rejected(row, empty, None)
    try:
        start_s, end_s = seconds("start", table.start), seconds("end", table.end)
        return ClipRow(
            clip_id=fill(table.clip_id) if table.clip_id else with_fragment(row.clip_id or audio, start_s, end_s),
            audio=audio,
            start_s=start_s,
            end_s=end_s,
            dataset=fill(table.dataset),
            domain=fill(table.domain),
            questions=[
                QuestionRow(
                    question=fill(table.question), answer=fill(answer), task=fill(table.task), choices=row.choices
                )
                for answer in table.answers
            ],
        )
    except _EmptyField as empty:
        return _rejected(row, empty, audio)


def _rejected(row: TableRow, empty: _EmptyField, audio: str | None) -> RejectedRow:
    return RejectedRow(clip_id=row.location, reason="empty_field", detail=f"the field {empty} is empty", audio=audio)


class _Formatter(string.Formatter):
    """Formats templates, and refuses values that are no text or number."""

    def __init__(self, location: str) -> None:
        self._location = location

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str | int]:
        value, key = super().get_field(field_name, args, kwargs)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN is unequal to NaN
            raise _EmptyField(f"'{field_name}'")
        if isinstance(value, list | dict):
            kind, entry = ("a list", "0") if isinstance(value, list) else ("an object", next(iter(value), "key"))
            remedy = f"name one entry in the template: {{{field_name}[{entry}]}}"
            raise UserError(self._location, f"field '{field_name}' is {kind}, not text", remedy)
        if isinstance(value, bytes):
            fault = f"field '{field_name}' is not UTF-8 text"
            raise UserError(self._location, fault, "store it as UTF-8, or name another field in `table`")
        return value, key
