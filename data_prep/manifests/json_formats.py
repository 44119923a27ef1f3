"""Reads JSON manifests: our own, OpenAQA, SLAM-LLM, chat messages (ms-swift, LLaMA-Factory), Audio Flamingo 3."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import ijson
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

PEEK_BYTES = 4096  # to tell an array from JSON lines


class _Foreign(BaseModel):
    """A record of another tool: the fields that we read; all others are ignored."""

    model_config = ConfigDict(extra="ignore")


class _OpenAqa(_Foreign):
    """As published with LTU (arXiv 2305.10790): one record per question."""

    instruction: str
    input: str = ""
    audio_id: str
    dataset: str
    task: str
    output: str


class _SlamLlm(_Foreign):
    """A line of SLAM-LLM: a path (`source`) and its transcript or answer (`target`)."""

    key: str
    source: str
    target: str
    prompt: str | None = None


class _Message(_Foreign):
    """A turn of a chat."""

    role: str
    content: str


class _Chat(_Foreign):
    """A conversation of ms-swift or LLaMA-Factory."""

    messages: list[_Message]
    audios: list[str]


class _AudioFlamingo(_Foreign):
    """A conversation of Audio Flamingo 3."""

    sound: str
    conversations: list[dict[str, str]]


# Fields by which the format of a record is detected.
KEYS = {
    "jsonl": {"clip_id", "audio", "questions"},
    "openaqa": {"instruction", "audio_id", "output"},
    "slam_llm": {"key", "source", "target"},
    "messages": {"messages", "audios"},
    "audio_flamingo": {"sound", "conversations"},
}


def detect(path: str) -> str:
    """Returns the format that shares the most keys with the first record; `jsonl`, our own, by default."""
    _, record = next(json_records(path), ("", None))
    keys = set(record) if isinstance(record, dict) else set()
    return max(KEYS, key=lambda name: len(KEYS[name] & keys))


def read_jsonl(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the rows of our own format."""
    for location, value in json_records(path):
        yield validate_row(ClipRow, value, location)


def read_text(path: str) -> Iterator[TextRow]:
    """Yields the rows of our own format without audio."""
    for location, value in json_records(path):
        yield validate_row(TextRow, value, location)


def read_openaqa(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields OpenAQA by clip; the `input` of a record is appended to its instruction."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_OpenAqa, value, location)
        question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        questions = [QuestionRow(question=question, answer=row.output, task=row.task)]
        return ClipRow(clip_id=row.audio_id, audio=row.audio_id, dataset=row.dataset, questions=questions)

    return _grouped(path, convert)


def read_slam_llm(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields SLAM-LLM by clip; `table.question` is the question of records without a prompt."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_SlamLlm, value, location)
        question = row.prompt or table.question
        if question is None:
            raise UserError(location, "has no 'prompt'", "give the prompt of all rows in `table.question`")
        return _clip(row.source, [(question, row.target)], table, clip_id=row.key)

    return _grouped(path, convert)


def read_messages(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields chats by clip; each exchange of user and assistant is a question, system messages are ignored."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_Chat, value, location)
        if len(row.audios) != 1:
            raise UserError(location, f"has {len(row.audios)} audios", "give rows of one clip each")
        turns = [(message.role, message.content) for message in row.messages if message.role != "system"]
        return _clip(row.audios[0], _pairs(turns, ("user", "assistant"), location), table)

    return _grouped(path, convert)


def read_audio_flamingo(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields conversations by clip; each exchange of human and gpt is a question."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_AudioFlamingo, value, location)
        for turn in row.conversations:
            for key in ("from", "value"):
                if key not in turn:
                    raise missing_field(location, f"conversations.{key}")
        turns = [(turn["from"], turn["value"]) for turn in row.conversations]
        return _clip(row.sound, _pairs(turns, ("human", "gpt"), location), table)

    return _grouped(path, convert)


def json_records(path: str) -> Iterator[tuple[str, Any]]:
    """Yields each record of JSON lines or of one JSON array, with its location for error messages.

    Memory is bounded by the largest record, not by the file. The location is `file:line` in JSON lines and
    `file: record N` (from 1) in an array.

    Raises:
        UserError: the file cannot be read or is not valid JSON.
    """
    try:
        with open_file(path) as stream:
            yield from _array_records(stream, path) if _is_array(stream) else _line_records(stream, path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read ({error})", "give a readable UTF-8 manifest") from error


def _is_array(stream: BinaryIO) -> bool:
    """Returns whether the first character that is not white space is `[`; rewinds the stream."""
    start = b""
    while not start and (block := stream.read(PEEK_BYTES)):
        start = block.lstrip()
    stream.seek(0)
    return start.startswith(b"[")


def _line_records(stream: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
    with io.TextIOWrapper(stream, encoding="utf-8") as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                location = f"{path}:{number}"
                yield location, parse_json(line, location)


def _array_records(stream: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, record in enumerate(ijson.items(stream, "item", use_float=True), start=1):
            yield f"{path}: record {number}", record
    except ijson.JSONError as error:
        # The first line of the parser's message is its reason, the others draw where it stopped.
        reason, *_ = (
            error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        ).splitlines()
        location = f"{path}: after record {number}" if number else path
        raise UserError(location, f"bad JSON ({reason})", "correct or complete the array") from error


def _grouped(path: str, convert: Callable[[Any, str], ClipRow]) -> Iterator[ClipRow]:
    return group_by_clip(convert(value, location) for location, value in json_records(path))


def _clip(audio: str, pairs: list[tuple[str, str]], table: TableConfig, clip_id: str | None = None) -> ClipRow:
    questions = [QuestionRow(question=question, answer=answer, task=table.task) for question, answer in pairs]
    return ClipRow(
        clip_id=clip_id or audio, audio=audio, dataset=table.dataset, domain=table.domain, questions=questions
    )


def _pairs(turns: list[tuple[str, str]], roles: tuple[str, str], location: str) -> list[tuple[str, str]]:
    """Returns question and answer of each exchange, without the audio placeholder."""
    if len(turns) % 2 or [role for role, _ in turns] != list(roles) * (len(turns) // 2):
        raise UserError(location, f"does not alternate between turns of {' and '.join(roles)}", "correct this row")
    questions = [text.replace("<audio>", "").replace("<sound>", "").strip() for _, text in turns[::2]]
    return list(zip(questions, [answer for _, answer in turns[1::2]], strict=True))
