"""Manifests in JSON: our own, OpenAQA, SLAM-LLM, chat messages (ms-swift, LLaMA-Factory), Audio Flamingo 3."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_prep.config import TableConfig
from data_prep.files import open_file
from data_prep.manifests.rows import (
    ClipRow,
    QuestionRow,
    TextRow,
    group_by_clip,
    missing_field,
    parse_json,
    validate_row,
)
from pipeline.core.errors import UserError

READ_CHARS = 1 << 20


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _OpenAqa(_Foreign):
    # As published with LTU (arXiv 2305.10790): one record per question.
    instruction: str
    input: str = ""
    audio_id: str
    dataset: str
    task: str
    output: str


class _SlamLlm(_Foreign):
    key: str
    source: str
    target: str
    prompt: str | None = None


class _Message(_Foreign):
    role: str
    content: str


class _Chat(_Foreign):
    messages: list[_Message]
    audios: list[str]


class _AudioFlamingo(_Foreign):
    sound: str
    conversations: list[dict[str, str]]


KEYS = {
    "jsonl": {"clip_id", "audio", "questions"},
    "openaqa": {"instruction", "audio_id", "output"},
    "slam_llm": {"key", "source", "target"},
    "messages": {"messages", "audios"},
    "audio_flamingo": {"sound", "conversations"},
}


def detect(path: str) -> str:
    """The format of a JSON manifest: the one that shares most keys with the first record; our own by default."""
    _, record = next(json_records(path), ("", None))
    keys = set(record) if isinstance(record, dict) else set()
    return max(KEYS, key=lambda name: len(KEYS[name] & keys))


def read_jsonl(path: str, table: TableConfig) -> Iterator[ClipRow]:
    for place, value in json_records(path):
        yield validate_row(ClipRow, value, place)


def read_text(path: str) -> Iterator[TextRow]:
    """Our own format without audio."""
    for place, value in json_records(path):
        yield validate_row(TextRow, value, place)


def read_openaqa(path: str, table: TableConfig) -> Iterator[ClipRow]:
    def convert(value: Any, place: str) -> ClipRow:
        row = validate_row(_OpenAqa, value, place)
        question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        questions = [QuestionRow(question=question, answer=row.output, task=row.task)]
        return ClipRow(clip_id=row.audio_id, audio=row.audio_id, dataset=row.dataset, questions=questions)

    return _grouped(path, convert)


def read_slam_llm(path: str, table: TableConfig) -> Iterator[ClipRow]:
    def convert(value: Any, place: str) -> ClipRow:
        row = validate_row(_SlamLlm, value, place)
        question = row.prompt or table.question
        if question is None:
            raise UserError(place, "has no 'prompt'", "give the prompt of all rows in `table.question`")
        return _clip(row.source, [(question, row.target)], table, clip_id=row.key)

    return _grouped(path, convert)


def read_messages(path: str, table: TableConfig) -> Iterator[ClipRow]:
    def convert(value: Any, place: str) -> ClipRow:
        row = validate_row(_Chat, value, place)
        if len(row.audios) != 1:
            raise UserError(place, f"has {len(row.audios)} audios", "give rows of one clip each")
        turns = [(message.role, message.content) for message in row.messages if message.role != "system"]
        return _clip(row.audios[0], _pairs(turns, ("user", "assistant"), place), table)

    return _grouped(path, convert)


def read_audio_flamingo(path: str, table: TableConfig) -> Iterator[ClipRow]:
    def convert(value: Any, place: str) -> ClipRow:
        row = validate_row(_AudioFlamingo, value, place)
        for turn in row.conversations:
            for key in ("from", "value"):
                if key not in turn:
                    raise missing_field(place, f"conversations.{key}")
        turns = [(turn["from"], turn["value"]) for turn in row.conversations]
        return _clip(row.sound, _pairs(turns, ("human", "gpt"), place), table)

    return _grouped(path, convert)


def json_records(path: str) -> Iterator[tuple[str, Any]]:
    """`file:line` and value of each record of JSON lines or of one JSON array, one record in memory at a time.

    Raises:
        UserError: unreadable, or not JSON.
    """
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8") as text:
            start = text.read(READ_CHARS)
            if start.lstrip()[:1] == "[":
                yield from _array(text, start, path)
            else:
                yield from _lines(text, start, path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read ({error})", "give a readable UTF-8 manifest") from error


def _lines(text: io.TextIOWrapper, start: str, path: str) -> Iterator[tuple[str, Any]]:
    number, rest = 1, start
    while True:
        *lines, rest = rest.split("\n")
        for line in lines:
            if line.strip():
                yield f"{path}:{number}", parse_json(line, f"{path}:{number}")
            number += 1
        more = text.read(READ_CHARS)
        if not more:
            break
        rest += more
    if rest.strip():
        yield f"{path}:{number}", parse_json(rest, f"{path}:{number}")


def _array(text: io.TextIOWrapper, start: str, path: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    blank = len(start) - len(start.lstrip())
    line, rest = 1 + start.count("\n", 0, blank), start[blank + 1 :]
    expect_value = True

    def advance(count: int) -> str:
        nonlocal line
        line += rest.count("\n", 0, count)
        return rest[count:]

    while True:
        rest = advance(len(rest) - len(rest.lstrip()))
        more: str | None = None
        if rest.startswith("]"):
            return
        if rest and not expect_value:
            if rest[0] != ",":
                raise UserError(f"{path}:{line}", "bad JSON (no comma or ] after a record)", "correct the file")
            rest, expect_value = rest[1:], True
            continue
        if rest:
            try:
                value, end = decoder.raw_decode(rest)
            except json.JSONDecodeError as error:
                more = text.read(READ_CHARS)  # the record may go on
                if not more:
                    place = f"{path}:{line + error.lineno - 1}"
                    raise UserError(place, f"bad JSON ({error.msg})", "correct this record") from error
            else:
                yield f"{path}:{line}", value
                rest, expect_value = advance(end), False
                continue
        else:
            more = text.read(READ_CHARS)
            if not more:
                raise UserError(f"{path}:{line}", "bad JSON (the array does not end)", "complete the file")
        rest += more


def _grouped(path: str, convert: Callable[[Any, str], ClipRow]) -> Iterator[ClipRow]:
    return group_by_clip(convert(value, place) for place, value in json_records(path))


def _clip(audio: str, pairs: list[tuple[str, str]], table: TableConfig, clip_id: str | None = None) -> ClipRow:
    questions = [QuestionRow(question=question, answer=answer, task=table.task) for question, answer in pairs]
    return ClipRow(
        clip_id=clip_id or audio, audio=audio, dataset=table.dataset, domain=table.domain, questions=questions
    )


def _pairs(turns: list[tuple[str, str]], roles: tuple[str, str], place: str) -> list[tuple[str, str]]:
    """Question and answer of each exchange, without the placeholder of the audio."""
    if len(turns) % 2 or [role for role, _ in turns] != list(roles) * (len(turns) // 2):
        raise UserError(place, f"is not a row of turns {' and '.join(roles)}", "correct this row")
    questions = [text.replace("<audio>", "").replace("<sound>", "").strip() for _, text in turns[::2]]
    return list(zip(questions, [answer for _, answer in turns[1::2]], strict=True))
