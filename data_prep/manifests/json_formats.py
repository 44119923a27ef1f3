"""Reads JSON manifests: our own, OpenAQA, SLAM-LLM, chat messages (ms-swift, LLaMA-Factory), Audio Flamingo 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from data_prep.config import TableConfig
from data_prep.manifests.conversations import refuse_unsupported_fields, single_exchange
from data_prep.manifests.json_records import json_records
from data_prep.manifests.rows import (
    ClipRow,
    QuestionRow,
    TextRow,
    validate_row,
)
from pipeline.core.errors import UserError


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


class _Chat(_Foreign):
    """A conversation of ms-swift or LLaMA-Factory (`messages`, or `conversations` in ShareGPT's words)."""

    turns: list[dict[str, Any]] = Field(validation_alias=AliasChoices("messages", "conversations"))
    audios: list[str]


class _AudioFlamingo(_Foreign):
    """A conversation of Audio Flamingo 3."""

    sound: str | list[str]
    conversations: list[dict[str, Any]]


# Fields by which the format of a record is detected.
KEYS = {
    "jsonl": {"clip_id", "audio", "questions"},
    "openaqa": {"instruction", "audio_id", "output"},
    "slam_llm": {"key", "source", "target"},
    "messages": {"messages", "audios"},
    "messages (ShareGPT)": {"conversations", "audios"},
    "audio_flamingo": {"sound", "conversations"},
}


def detect(path: str) -> str:
    """Returns the format that shares the most keys with the first record; `jsonl`, our own, by default."""
    _, record = next(json_records(path), ("", None))
    keys = set(record) if isinstance(record, dict) else set()
    return max(KEYS, key=lambda name: len(KEYS[name] & keys)).partition(" ")[0]


def read_jsonl(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the rows of our own format."""
    for location, value in json_records(path):
        yield validate_row(ClipRow, value, location)


def read_text(path: str) -> Iterator[TextRow]:
    """Yields the rows of our own format without audio."""
    for location, value in json_records(path):
        yield validate_row(TextRow, value, location)


def read_openaqa(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the records of OpenAQA; the `input` of a record is appended to its instruction."""
    for location, value in _foreign_records(path):
        row = validate_row(_OpenAqa, value, location)
        question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        yield ClipRow(
            clip_id=row.audio_id,
            audio=row.audio_id,
            dataset=row.dataset,
            domain=table.domain,
            questions=[QuestionRow(question=question, answer=row.output, task=row.task)],
        )


def read_slam_llm(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the rows of SLAM-LLM; `table.question` is the question of records without a prompt."""
    for location, value in _foreign_records(path):
        row = validate_row(_SlamLlm, value, location)
        question = row.prompt or table.question
        if question is None:
            raise UserError(location, "has no 'prompt'", "give the prompt of all rows in `table.question`")
        yield _clip(row.source, (question, row.target), table, clip_id=row.key)


def read_messages(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields chats of one exchange between user and assistant about one clip; others are errors."""
    for location, value in _foreign_records(path):
        row = validate_row(_Chat, value, location)
        if len(row.audios) != 1:
            raise UserError(location, f"has {len(row.audios)} audios", "give rows of one clip each")
        yield _clip(row.audios[0], single_exchange(row.turns, location), table)


def read_audio_flamingo(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields conversations of one exchange between human and gpt about one clip; others are errors."""
    for location, value in _foreign_records(path):
        row = validate_row(_AudioFlamingo, value, location)
        sounds = [row.sound] if isinstance(row.sound, str) else row.sound
        if len(sounds) != 1:
            raise UserError(location, f"has {len(sounds)} sounds", "give rows of one clip each")
        yield _clip(sounds[0], single_exchange(row.conversations, location), table)


def _foreign_records(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the records of another tool, without those fields that change what we would read.

    Raises:
        UserError: a record has such a field.
    """
    for location, value in json_records(path):
        if isinstance(value, dict):
            refuse_unsupported_fields(value, location)
        yield location, value


def _clip(audio: str, exchange: tuple[str, str], table: TableConfig, clip_id: str | None = None) -> ClipRow:
    question, answer = exchange
    return ClipRow(
        clip_id=clip_id or audio,
        audio=audio,
        dataset=table.dataset,
        domain=table.domain,
        questions=[QuestionRow(question=question, answer=answer, task=table.task)],
    )
