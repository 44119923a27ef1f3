"""Reads JSON manifests: our own, OpenAQA, SLAM-LLM, chats (ms-swift, LLaMA-Factory, OpenAI), Audio Flamingo 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from data_prep.audio.fragments import with_fragment
from data_prep.config import TableConfig
from data_prep.manifests.clips import RejectedRow
from data_prep.manifests.conversations import MissingPlaceholders, Record, audio_of, conversation_of
from data_prep.manifests.json_records import json_records
from data_prep.manifests.own_conversations import question_values
from data_prep.manifests.placeholders import PLACEHOLDER
from data_prep.manifests.rows import AudioSegment, ClipRow, QuestionRow, TextRow, validate_row
from data_prep.manifests.segment_fields import segment_of
from data_prep.manifests.unsupported import Unsupported, refuse_fields
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


Audios = str | dict[str, Any] | list[str | dict[str, Any]] | None


class _Chat(_Foreign):
    """A conversation of ms-swift or LLaMA-Factory (`messages`, or `conversations` in ShareGPT's words)."""

    turns: list[dict[str, Any]] = Field(validation_alias=AliasChoices("messages", "conversations"))
    audios: Audios = Field(default=None, validation_alias=AliasChoices("audios", "audio"))
    system: str | None = None


class _Query(_Foreign):
    """An exchange of ms-swift (`query`), or in Alpaca's words (`instruction`), with the exchanges before it."""

    query: str = Field(validation_alias=AliasChoices("query", "instruction"))
    input: str | None = None
    response: str = Field(validation_alias=AliasChoices("response", "output"))
    history: list[tuple[str, str]] | None = None
    audios: Audios = Field(default=None, validation_alias=AliasChoices("audios", "audio"))
    system: str | None = None


class _AudioFlamingo(_Foreign):
    """A conversation of Audio Flamingo 3."""

    sound: Audios = None
    conversations: list[dict[str, Any]]
    system: str | None = None


# Fields by which the format of a record is detected.
KEYS = {
    "jsonl": {"clip_id", "audio", "questions"},
    "openaqa": {"instruction", "audio_id", "output"},
    "slam_llm": {"key", "source", "target"},
    "messages": {"messages", "audios"},
    "messages (one audio)": {"messages", "audio"},
    "messages (ShareGPT)": {"conversations", "audios"},
    "messages (query)": {"query", "response", "audios"},
    "messages (Alpaca)": {"instruction", "output", "audios"},
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
        yield validate_row(ClipRow, _with_turns(value, location, has_audio=True), location)


def read_text(path: str) -> Iterator[TextRow]:
    """Yields the rows of our own format without audio."""
    for location, value in json_records(path):
        yield validate_row(TextRow, _with_turns(value, location, has_audio=False), location)


def _with_turns(row: Any, location: str, *, has_audio: bool) -> Any:
    """Returns a row of our own format with its conversations as `QuestionRow` has them."""
    if not isinstance(row, dict) or not isinstance(row.get("questions"), list):
        return row
    questions = [
        question_values(question, f"{location}: question {number}", has_audio=has_audio)
        for number, question in enumerate(row["questions"], start=1)
    ]
    return {**row, "questions": questions}


def read_openaqa(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields the records of OpenAQA; the `input` of a record is appended to its instruction."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_OpenAqa, value, location)
        refuse_fields(value)
        text = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        audio, question = _exchange(row.audio_id, (text, row.output), value, row.task)
        return _clip(audio, question, table, dataset=row.dataset)

    return _foreign_rows(path, convert)


def read_slam_llm(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields the rows of SLAM-LLM; `table.question` is the question of records without a prompt."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_SlamLlm, value, location)
        refuse_fields(value)
        text = row.prompt or table.question
        if text is None:
            raise UserError(location, "has no 'prompt'", "give the prompt of all rows in `table.question`")
        audio, question = _exchange(row.source, (text, row.target), value, table.task)
        return _clip(audio, question, table, clip_id=row.key)

    return _foreign_rows(path, convert)


def read_messages(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields chats of ms-swift, LLaMA-Factory and OpenAI.

    A sound without a placeholder stands in front of the first user turn, where ms-swift puts it; in the formats of
    LLaMA-Factory, which refuses such rows, its row is rejected.
    """

    return _foreign_rows(path, lambda value, location: messages_row(value, location, table))


def messages_row(value: Any, location: str, table: TableConfig) -> ClipRow:
    """Returns the row of one record of a chat; see `read_messages`.

    Raises:
        UserError: a field is missing or has the wrong type.
        Unsupported: a feature set cannot hold the record.
    """
    is_exchange = isinstance(value, dict) and not {"messages", "conversations"} & value.keys()
    row = _chat_of(validate_row(_Query, value, location)) if is_exchange else validate_row(_Chat, value, location)
    refuse_fields(value, frozenset({"system", "history"} if is_exchange else {"system"}))
    missing: MissingPlaceholders = "in front" if {"messages", "query"} & value.keys() else "refused"
    record = Record(row.turns, _audios(row.audios), missing, row.system, segment_of(value))
    return _clip(*conversation_of(record, location, table.task), table)


def read_audio_flamingo(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields conversations between human and gpt; sounds stand in front if there is no placeholder at all."""

    def convert(value: Any, location: str) -> ClipRow:
        row = validate_row(_AudioFlamingo, value, location)
        refuse_fields(value, frozenset({"system"}))
        record = Record(row.conversations, _audios(row.sound), "all in front", row.system, segment_of(value))
        return _clip(*conversation_of(record, location, table.task), table)

    return _foreign_rows(path, convert)


def _foreign_rows(path: str, convert: Callable[[Any, str], ClipRow]) -> Iterator[ClipRow | RejectedRow]:
    """Yields the rows of another tool; those that a feature set cannot hold are rejected under their location."""
    for location, value in json_records(path):
        try:
            yield convert(value, location)
        except Unsupported as unsupported:
            yield RejectedRow(clip_id=location, reason="unsupported", detail=str(unsupported))


def _chat_of(row: _Query) -> _Chat:
    query = f"{row.query}\n{row.input}" if row.input else row.query
    turns = [
        {"role": role, "content": content}
        for exchange in (*(row.history or ()), (query, row.response))
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    return _Chat.model_validate({"messages": turns, "audios": row.audios, "system": row.system})


def _audios(value: Audios) -> list[AudioSegment]:
    return [audio_of(entry) for entry in (value if isinstance(value, list) else [value]) if entry]


def _exchange(
    audio: str, exchange: tuple[str, str], value: dict[str, Any], task: str
) -> tuple[AudioSegment, QuestionRow]:
    """Returns a question and its answer about one sound, whose place is kept where the question shows it."""
    question, answer = exchange
    start, end = segment_of(value)
    sound = AudioSegment(audio=audio, start_s=start, end_s=end)
    if not PLACEHOLDER.search(question):
        return sound, QuestionRow(question=question, answer=answer, task=task)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return conversation_of(Record(turns, [sound], "refused"), "", task)


def _clip(
    sound: AudioSegment,
    question: QuestionRow,
    table: TableConfig,
    clip_id: str | None = None,
    dataset: str | None = None,
) -> ClipRow:
    return ClipRow(
        clip_id=clip_id or with_fragment(sound.audio, sound.start_s, sound.end_s),
        audio=sound.audio,
        start_s=sound.start_s,
        end_s=sound.end_s,
        dataset=table.dataset if dataset is None else dataset,
        domain=table.domain,
        questions=[question],
    )
