"""Converts the conversations of other tools: their turns, system text, sounds and placeholders.

A conversation stays whole: it becomes one question with all its turns (see `Turn`), which are trained on wherever the
tool trains on them. One that is a question and an answer about one sound in front becomes a plain question. What a
feature set cannot hold raises `Unsupported`, and the row is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import unquote

from data_prep.manifests.placeholders import Slot, sounds_of_slots, split_text, text_of, tidy
from data_prep.manifests.rows import AudioSegment, QuestionRow, missing_field
from data_prep.manifests.segment_fields import segment_of
from data_prep.manifests.unsupported import Unsupported
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Turn

ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# Fields of a turn that a feature set does not hold.
_TURN_FIELDS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "images", "videos")
_PATH_KEYS = ("path", "url", "audio", "audio_url", "input_audio")
# Where a tool puts sounds that have no placeholder: ms-swift in front of the first user turn, Audio Flamingo too but
# only if there is no placeholder at all; LLaMA-Factory refuses them.
MissingPlaceholders = Literal["in front", "all in front", "refused"]


@dataclass
class Message:
    """A turn of another tool: its texts, the places of sounds, and sounds that it names itself."""

    role: Literal["system", "user", "assistant"]
    content: list[str | Slot | AudioSegment]
    loss: bool = True


@dataclass(frozen=True)
class Record:
    """The conversation of one row.

    Attributes:
        turns: turns with `role` and `content` (ms-swift, OpenAI) or `from` and `value` (ShareGPT, Audio Flamingo).
        audios: sounds of the row, in the order of the placeholders.
        missing: what the tool does with sounds without a placeholder.
        system: system text of the row.
        segment: start and end in seconds that the row selects of its sound; None where it names none.
    """

    turns: Sequence[dict[str, Any]]
    audios: Sequence[AudioSegment]
    missing: MissingPlaceholders
    system: str | None = None
    segment: tuple[float | None, float | None] = field(default=(None, None))


def conversation_of(record: Record, location: str, task: str) -> tuple[AudioSegment, QuestionRow]:
    """Returns the first sound of a conversation, and the conversation as a question about it.

    Raises:
        UserError: a turn has no role or no content, or they have the wrong type.
        Unsupported: a feature set cannot hold the conversation.
    """
    messages = [_message(turn, f"{location}: turn {number}") for number, turn in enumerate(record.turns, start=1)]
    system, messages = _without_system(messages, record.system)
    sounds = _place_sounds(messages, record)
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    if not any(turn.loss for turn in turns[1::2]):
        raise Unsupported("no answer is trained on (`loss: false`)")
    order = list(dict.fromkeys(part for turn in turns for part in turn.content if isinstance(part, int)))
    turns = [
        turn.model_copy(
            update={"content": [order.index(part) if isinstance(part, int) else part for part in turn.content]}
        )
        for turn in turns
    ]
    first, *others = (sounds[index] for index in order)
    question, answer = text_of(turns[-2].content), str(turns[-1].content[0])
    is_plain = len(turns) == 2 and not others and turns[0].content in ([0], [0, question])
    return first, QuestionRow(
        question=question,
        answer=answer,
        task=task,
        system=system,
        turns=None if is_plain else turns,
        other_audio=others,
    )


def audio_of(value: Any) -> AudioSegment:
    """Returns the sound that an entry of another tool names: a path or URL, or an object with one and its segment.

    Raises:
        Unsupported: the entry holds the audio itself, or is something else.
    """
    start, end, path = None, None, value
    if isinstance(value, dict):
        start, end = segment_of(value)
        path = next((value[key] for key in _PATH_KEYS if value.get(key)), None)
        if path is None and (value.get("data") or value.get("bytes")):
            raise Unsupported("holds audio as base64 or bytes, not as a path")
    if isinstance(path, dict):
        return audio_of(path)
    if not isinstance(path, str) or not path:
        raise Unsupported(f"names no path of its audio ({str(value)[:40]})")
    if path.startswith("data:"):
        raise Unsupported("holds audio as base64, not as a path")
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    return AudioSegment(audio=path, start_s=start, end_s=end)


def _message(turn: dict[str, Any], location: str) -> Message:
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, text_key):
        if key not in turn:
            raise missing_field(location, key)
    role, content = turn[role_key], turn[text_key]
    where = location.rpartition(": ")[2]
    if not isinstance(role, str) or role not in ROLES:
        raise Unsupported(f"{where} has the role {role!r}")
    for name in _TURN_FIELDS:
        if turn.get(name):
            raise Unsupported(f"{where} has the field '{name}'")
    if content is None:
        raise Unsupported(f"{where} has no content")
    if not isinstance(content, str | list):
        raise UserError(location, f"'{text_key}' is {type(content).__name__}, not text", "correct this row")
    try:
        parts = [piece for part in ([content] if isinstance(content, str) else content) for piece in _part(part)]
        return Message(ROLES[role], parts, _loss(turn, ROLES[role]))
    except Unsupported as unsupported:
        raise Unsupported(f"{where} {unsupported}") from unsupported


def _part(part: Any) -> list[str | Slot | AudioSegment]:
    """Returns what a part of a content in OpenAI's form holds."""
    if isinstance(part, str):
        return list(split_text(part))
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        return list(split_text(str(part.get("text") or "")))
    if kind in ("audio", "input_audio", "audio_url"):
        named = {key: value for key, value in part.items() if key != "type"}
        return [audio_of(named)] if any(named.values()) else [Slot()]
    raise Unsupported(f"has a part of type {kind!r}")


def _loss(turn: dict[str, Any], role: str) -> bool:
    """Returns whether a turn is trained on (`loss` of ms-swift, `weight` of OpenAI)."""
    losses = [turn[key] for key in ("loss", "weight") if turn.get(key) is not None]
    for loss in losses:
        if loss not in (0, 1):
            raise Unsupported(f"has a loss of its own ({loss!r})")
        if role != "assistant" and loss:
            raise Unsupported("is trained on, and is no answer")
    return all(losses)


def _without_system(messages: list[Message], system: str | None) -> tuple[str | None, list[Message]]:
    """Returns the system text, None for an empty one, and the turns of user and assistant."""
    texts = [system.strip()] if system and system.strip() else []
    if messages and messages[0].role == "system":
        if not all(isinstance(part, str) for part in messages[0].content):
            raise Unsupported("has a sound in its system text")
        text = "".join(cast(list[str], messages[0].content)).strip()
        texts += [text] if text else []
        messages = messages[1:]
    if len(set(texts)) > 1:
        raise Unsupported("has two system texts")
    roles = [message.role for message in messages]
    if "system" in roles:
        raise Unsupported("has a system turn behind other turns")
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unsupported(f"does not alternate between user and assistant up to an answer ({', '.join(roles)})")
    return (texts[0] if texts else None), messages


def _place_sounds(messages: list[Message], record: Record) -> list[AudioSegment]:
    """Returns all sounds, after replacing each place of a sound in the user turns by a slot with its index."""
    parts = [part for message in messages[::2] for part in message.content]
    named = [part for part in parts if isinstance(part, AudioSegment)]
    slots = [part for part in parts if isinstance(part, Slot)]
    audios = list(record.audios)
    if named and audios:
        if slots or [sound.audio for sound in named] != [sound.audio for sound in audios]:
            raise Unsupported("names sounds both in its turns and in a field of the row")
        audios = []
    if named and slots:
        raise Unsupported(f"has {len(slots)} audio placeholders beside the sounds that its turns name")
    missing = len(audios) - len(slots)
    if not named and not audios:
        raise Unsupported("has no audio")
    if missing < 0 or (missing and (record.missing == "refused" or (slots and record.missing == "all in front"))):
        raise Unsupported(f"has {len(slots)} audio placeholders for {len(audios)} sounds")
    messages[0].content[:0] = [Slot()] * missing
    slots = [Slot()] * missing + slots
    sounds = named or audios
    if record.segment != (None, None):
        if len(sounds) > 1 or (sounds[0].start_s, sounds[0].end_s) != (None, None):
            raise Unsupported("selects a segment of a sound, and has several sounds or segments")
        sounds = [AudioSegment(audio=sounds[0].audio, start_s=record.segment[0], end_s=record.segment[1])]
    indices = iter(range(len(sounds)) if named else sounds_of_slots(slots, len(sounds)))
    for message in messages[::2]:
        message.content = [part if isinstance(part, str) else Slot(next(indices)) for part in message.content]
    return sounds


def _turn(message: Message, number: int) -> Turn:
    content = [part.number if isinstance(part, Slot) else part for part in message.content]
    if message.role == "assistant":
        if not all(isinstance(part, str) for part in content):
            raise Unsupported("has an audio placeholder in an answer")
        content = ["".join(cast(list[str], content))]
        if not str(content[0]).strip():
            raise Unsupported(f"answer {number // 2} is empty")
        return Turn(role="assistant", content=cast(list[str | int], content), loss=message.loss)
    placed = tidy(cast(list[str | int], content))
    if not placed:
        raise Unsupported(f"turn {number} is empty")
    return Turn(role="user", content=placed)
