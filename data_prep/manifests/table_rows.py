"""Converts rows of tables and archives: to questions by templates, or to the conversations that their columns hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.audio.fragments import with_fragment
from data_prep.config import TableConfig
from data_prep.manifests.clips import RejectedRow
from data_prep.manifests.json_formats import messages_row
from data_prep.manifests.json_records import parse_json
from data_prep.manifests.rows import ClipRow, QuestionRow
from data_prep.manifests.segment_fields import DURATION_FIELDS, END_FIELDS, START_FIELDS
from data_prep.manifests.templates import EmptyField, TableRow, Templates, refuse_unused_times
from data_prep.manifests.unsupported import Unsupported
from pipeline.core.errors import UserError

# Columns that hold conversations, as the JSON formats of other tools name them, and sounds beside them.
_CONVERSATIONS: tuple[set[str], ...] = (
    {"messages"},
    {"conversations"},
    {"query", "response"},
    {"instruction", "output"},
)
_SOUNDS = ("audios", "audio", "sound")
_JSON_COLUMNS = {"messages", "conversations", "history", *_SOUNDS}  # CSV holds lists as JSON
_TIMES = {*START_FIELDS, *END_FIELDS, *DURATION_FIELDS}


def holds_conversations(fields: Mapping[str, Any], table: TableConfig) -> bool:
    """Returns whether columns of these names are read as conversations: if `table.question` is not set."""
    return table.question is None and any(columns <= fields.keys() for columns in _CONVERSATIONS)


def fill_row(row: TableRow, table: TableConfig) -> ClipRow | RejectedRow:
    """Returns the row with its questions or its conversation, rejected if a field that is needed is empty.

    Raises:
        UserError: the row has neither a conversation nor `table.question`, or both, a field is missing or has the wrong
            type, a time is no number, or fields select a segment that no template names.
    """
    if holds_conversations(row.fields, table):
        return _conversation_row(row, table)
    if table.question is None:
        raise UserError(
            "table.question", f"is not set, and {row.location} has no question", "give the question of all rows"
        )
    _refuse_unread_conversations(row, table)
    templates = Templates(row, table)
    try:
        audio = templates.fill(table.audio)
    except EmptyField as empty:
        return _rejected(row, empty, None)
    try:
        start_s, end_s = templates.segment()
        questions = [
            QuestionRow(
                question=templates.fill(table.question),
                answer=templates.fill(answer),
                task=templates.fill(table.task),
                choices=row.choices,
            )
            for answer in table.answers
        ]
        return ClipRow(
            clip_id=_clip_id(row, table, templates, with_fragment(audio, start_s, end_s)),
            audio=audio,
            start_s=start_s,
            end_s=end_s,
            dataset=templates.fill(table.dataset),
            domain=templates.fill(table.domain),
            questions=questions,
        )
    except EmptyField as empty:
        return _rejected(row, empty, audio)


def _refuse_unread_conversations(row: TableRow, table: TableConfig) -> None:
    for column in ("messages", "conversations"):
        named = any(f"{{{column}" in template for template in (str(table.question), *table.answers))
        if row.fields.get(column) and not named:
            fault = f"has conversations in its column '{column}', which no template names"
            remedy = "remove `table.question` to read them, or the column"
            raise UserError(row.location, fault, remedy)


def _conversation_row(row: TableRow, table: TableConfig) -> ClipRow | RejectedRow:
    refuse_unused_times(table, row.fields, row.location)
    templates = Templates(row, table)
    record = {key: value for key, value in row.fields.items() if key.lower() not in _TIMES}
    for key in _JSON_COLUMNS & record.keys():
        record[key] = _value(record[key], f"{row.location}: {key}")
    try:
        for key in next(columns for columns in _CONVERSATIONS if columns <= record.keys()):
            if not record[key]:
                raise EmptyField(f"'{key}'")
        if row.sounds is not None:
            sounds: Any = row.sounds
            for key in {"audios", "sound"} & record.keys():
                if isinstance(record[key], list) and len(record[key]) != len(sounds):
                    raise Unsupported(f"field '{key}' names {len(record[key])} sounds, and the row holds {len(sounds)}")
        elif "audio" in table.model_fields_set:
            sounds = [templates.fill(table.audio)]
        else:
            sounds = next((record[key] for key in _SOUNDS if record.get(key)), None)
        record = {key: value for key, value in record.items() if key not in _SOUNDS}
        record |= {"audios": sounds}
        start_s, end_s = templates.segment()
        record |= {"start_s": start_s, "end_s": end_s}
        labels = {key: templates.fill(getattr(table, key)) for key in ("task", "dataset", "domain")}
        clip = messages_row(record, row.location, table.model_copy(update=labels))
        return clip.model_copy(update={"clip_id": _clip_id(row, table, templates, clip.clip_id)})
    except EmptyField as empty:
        return _rejected(row, empty, None)
    except Unsupported as unsupported:
        return RejectedRow(clip_id=row.location, reason="unsupported", detail=str(unsupported))


def _value(value: Any, location: str) -> Any:
    """Returns a value that a table holds as JSON; other text, such as a path, unchanged."""
    is_json = isinstance(value, str) and value.lstrip().startswith(("[", "{"))
    return parse_json(value, location) if is_json else value


def _clip_id(row: TableRow, table: TableConfig, templates: Templates, default: str) -> str:
    if table.clip_id:
        return templates.fill(table.clip_id)
    return with_fragment(row.clip_id, *templates.segment()) if row.clip_id else default


def _rejected(row: TableRow, empty: EmptyField, audio: str | None) -> RejectedRow:
    return RejectedRow(clip_id=row.location, reason="empty_field", detail=f"the field {empty} is empty", audio=audio)
