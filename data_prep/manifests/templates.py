"""Fills the templates of `TableConfig` with the fields of a table's rows."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.config import TableConfig
from data_prep.manifests.rows import missing_field
from data_prep.manifests.segment_fields import DURATION_FIELDS, END_FIELDS, START_FIELDS
from pipeline.core.errors import UserError

_EDGES = (START_FIELDS, END_FIELDS, DURATION_FIELDS)


class EmptyField(Exception):
    """A template names a field that is empty in this row."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        location: file and line, row or member, for error messages; the id of the row when it is rejected.
        clip_id: id of the clip where `table.clip_id` has no template; None means the path of the audio.
        choices: choices of all questions of the row.
        sounds: sounds of an archive's row, which a conversation is about; None where fields name them.
    """

    fields: Mapping[str, Any]
    location: str
    clip_id: str | None = None
    choices: list[str] | None = None
    sounds: list[str] | None = None


class Templates:
    """Fills the templates of a table with the fields of one row."""

    def __init__(self, row: TableRow, table: TableConfig) -> None:
        self._row, self._table = row, table
        self._formatter = _Formatter(row.location)

    def fill(self, template: str) -> str:
        """Returns the text of a template.

        Raises:
            EmptyField: a field that it names is empty.
            UserError: a field is missing, or is a list, an object or bytes.
        """
        try:
            return self._formatter.vformat(template, (), self._row.fields)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise missing_field(self._row.location, str(error.args[0])) from error

    def segment(self) -> tuple[float | None, float | None]:
        """Returns start and end in seconds of the row's segment; None where the table names none.

        Raises:
            EmptyField: a field that a template names is empty.
            UserError: a field is missing, or a time is no number.
        """
        start = self._seconds("start", self._table.start)
        duration = self._seconds("duration", self._table.duration)
        if duration is not None:
            return start, (start or 0.0) + duration
        return start, self._seconds("end", self._table.end)

    def _seconds(self, key: str, template: str | None) -> float | None:
        if template is None:
            return None
        text = self.fill(template)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(self._row.location, f"`table.{key}` is '{text}' here, not a number", "give it in seconds")
        return value


def refuse_unused_times(table: TableConfig, columns: Iterable[str], where: str) -> None:
    """Checks that a table whose columns select segments is not read as whole files.

    Raises:
        UserError: it has columns of a start and of an end or a duration, which no template names.
    """
    columns = list(columns)
    edges = [next((name for name in columns if name.lower() in fields), None) for fields in _EDGES]
    start, end = edges[0], edges[1] or edges[2]
    if start is None or end is None or {"start", "end", "duration"} & table.model_fields_set:
        return
    if any(f"{{{name}}}" in template for name in (start, end) for template in (table.audio, table.clip_id or "")):
        return  # the files are named by their times: they are cut already
    key = "duration" if edges[1] is None else "end"
    remedy = f'set `table: {{start: "{{{start}}}", {key}: "{{{end}}}"}}` with columns in seconds'
    fault = f"has columns '{start}' and '{end}', which no template names"
    raise UserError(where, fault, f"{remedy}, or `table: {{start: null}}` where the files are cut already")


class _Formatter(string.Formatter):
    """Formats templates, and refuses values that are no text or number."""

    def __init__(self, location: str) -> None:
        self._location = location

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str | int]:
        value, key = super().get_field(field_name, args, kwargs)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN is unequal to NaN
            raise EmptyField(f"'{field_name}'")
        if isinstance(value, list | dict):
            kind, entry = ("a list", "0") if isinstance(value, list) else ("an object", next(iter(value), "key"))
            remedy = f"name one entry in the template: {{{field_name}[{entry}]}}"
            raise UserError(self._location, f"field '{field_name}' is {kind}, not text", remedy)
        if isinstance(value, bytes):
            fault = f"field '{field_name}' is not UTF-8 text"
            raise UserError(self._location, fault, "store it as UTF-8, or name another field in `table`")
        return value, key
