"""Reads the conversations of our own format: `turns`, `other_audio`, and `<audio>` where a clip stands in a text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from data_prep.manifests.placeholders import text_of, tidy
from pipeline.core.errors import UserError

PLACEHOLDER = "<audio>"
_ROLES = ("user", "assistant")


def question_values(value: Any, location: str, *, has_audio: bool) -> Any:
    """Returns the values of a `QuestionRow` from a question as it is written in a manifest; plain ones unchanged.

    Args:
        has_audio: whether the row has a clip.

    Raises:
        UserError: the turns do not alternate, are empty, or do not name each clip; names the question and the turn.
    """
    if not isinstance(value, dict):
        return value
    has_placeholder = has_audio and PLACEHOLDER in str(value.get("question"))
    if "turns" not in value and not value.get("other_audio") and not has_placeholder:
        return value
    if value.get("turns") is None and not ("question" in value and "answer" in value):
        return value
    others = _other_audio(value.get("other_audio") or [], location)
    if others and not has_audio:
        raise UserError(location, "names `other_audio` in a set without audio", "remove it, or prepare with encoders")
    turns = value.get("turns")
    if turns is None:
        turns = [{"role": "user", "content": value["question"]}, {"role": "assistant", "content": value["answer"]}]
    turns = _turns(turns, location)
    _place_clips(turns, 1 + len(others) if has_audio else 0, location)
    derived = {"question": text_of(turns[-2]["content"]), "answer": turns[-1]["content"][0]}
    for key, text in derived.items():
        stated = value.get(key)
        if "turns" in value and stated is not None and stated != text:
            raise UserError(location, f"'{key}' differs from the last turns", f"leave '{key}' out: `turns` has it")
    is_plain = len(turns) == 2 and turns[0]["content"] in ([0, derived["question"]], [0], [derived["question"]])
    is_plain = is_plain and not others and turns[1].get("loss", True) is True
    return {**value, **derived, "turns": None if is_plain else turns, "other_audio": others}


def _other_audio(value: Any, location: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(location, "'other_audio' is no list", 'write ["b.flac"] or [{"audio": "b.flac", "start_s": 2}]')
    return [{"audio": entry} if isinstance(entry, str) else entry for entry in value]


def _turns(value: Any, location: str) -> list[dict[str, Any]]:
    """Returns turns with lists as contents, in which `<audio>` is the next clip's index."""
    if not isinstance(value, list) or not value:
        raise UserError(location, "'turns' is no list of turns", 'write [{"role": "user", "content": "..."}, ...]')
    turns = []
    indices = count()
    is_indexed, has_placeholders = False, False
    for number, turn in enumerate(value, start=1):
        where = f"{location}: turn {number}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise UserError(where, "is no object with `role` and `content`", "correct this turn")
        if turn["role"] == "system":
            raise UserError(where, "is a system text", 'write it as "system": "..." beside `turns`')
        if turn["role"] != _ROLES[(number - 1) % 2]:
            expected = _ROLES[(number - 1) % 2]
            raise UserError(
                where, f"is of {turn['role']!r}", f"alternate user and assistant: this one is `{expected}`'s"
            )
        parts = list(_parts(turn["content"], where))
        is_indexed |= any(isinstance(part, int) for part in parts)
        has_placeholders |= None in parts
        content = tidy([next(indices) if part is None else part for part in parts])
        if turn["role"] == "assistant":
            if not all(isinstance(part, str) for part in content):
                raise UserError(where, "is an answer and names a clip", "keep clips in the turns of the user")
            content = ["".join(part for part in parts if isinstance(part, str))]
        if not any(isinstance(part, int) or part.strip() for part in content):
            raise UserError(where, "is empty", "write its text, or remove this turn and the one it belongs to")
        turns.append({**turn, "content": content})
    if is_indexed and has_placeholders:
        raise UserError(location, "names clips by index and by `<audio>`", "use one of them")
    if len(turns) % 2:
        raise UserError(location, "ends with a turn of the user", "end it with the answer of the assistant")
    return turns


def _parts(content: Any, where: str) -> Iterator[str | int | None]:
    """Yields texts, indices of clips, and None for the next clip."""
    if isinstance(content, str):
        for position, text in enumerate(content.split(PLACEHOLDER)):
            if position:
                yield None
            if text:
                yield text
        return
    if not isinstance(content, list):
        raise UserError(where, "has a content that is no text", "write a text, or a list of texts and clip indices")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or (isinstance(part, int) and not isinstance(part, bool)):
            yield part
        elif kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind == "audio" and len(part) == 1:
            yield None
        else:
            remedy = 'use texts, clip indices, {"type": "text", "text": "..."} and {"type": "audio"}'
            raise UserError(where, f"has the part {str(part)[:60]}", remedy)


def _place_clips(turns: list[dict[str, Any]], clips: int, location: str) -> None:
    """Checks that the turns name each clip, the row's own first; puts a single clip that none names in front."""
    named = [part for turn in turns for part in turn["content"] if isinstance(part, int)]
    if clips == 1 and not named:
        turns[0]["content"].insert(0, 0)
        return
    for index in named:
        if not 0 <= index < clips:
            fault = f"names {index + 1} clips" if index >= 0 else f"names the clip {index}"
            fault += f", the row has {clips} (its own and {max(clips - 1, 0)} of `other_audio`)"
            raise UserError(location, fault, "correct the turns or `other_audio`")
    for index in range(clips):
        if index not in named:
            name = "the clip of the row" if index == 0 else f"other_audio.{index - 1}"
            raise UserError(location, f"no turn names {name}", "write `<audio>` where it stands in the text")
    if named and named[0] != 0:
        fault = f"names other_audio.{named[0] - 1} before the clip of the row"
        raise UserError(location, fault, "make the first clip of the turns the `audio` of the row")
