"""Reads conversations of other tools as one question and one answer; refuses by name what that would change."""

from __future__ import annotations

import re
from typing import Any

from data_prep.manifests.rows import missing_field
from pipeline.core.errors import UserError

# What stands for the audio in the texts of ms-swift, LLaMA-Factory, Qwen (2 and 3), Audio Flamingo, SALMONN and Phi.
PLACEHOLDER = re.compile(
    r"<\|audio_(?:bos|start)\|>\s*<\|audio(?:_pad)?\|>\s*<\|audio_(?:eos|end)\|>"
    r"|<(?P<tag>audio|speech)>\s*<(?P=tag)here>\s*</(?P=tag)>"
    r"|<\|(?:audio|sound|speech)(?:_pad|_\d+)?\|>"
    r"|<(?:audio|sound|speech)(?:[-_]?\d+|here)?>",
    re.IGNORECASE,
)
OTHER_MEDIA = re.compile(r"<\|?(?:image|video)(?:_pad|_\d+)?\|?>", re.IGNORECASE)
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

# Fields of records that change what is trained, with the reason why they are refused.
UNSUPPORTED_FIELDS = {
    "system": "a system text of its own, which is not kept",
    "history": "earlier turns, which are not kept",
    "tools": "tools, which are not kept",
    "images": "images, which are not read",
    "videos": "videos, which are not read",
    "rejected_response": "a rejected answer, which is not kept",
    "rejected_messages": "a rejected conversation, which is not kept",
    "chosen": "a preferred answer, which is not kept",
    "rejected": "a rejected answer, which is not kept",
}
SEGMENT_FIELDS = {
    *("start", "end", "begin", "offset", "segment", "segments", "timestamps"),
    *(
        f"{edge}_{unit}"
        for edge in ("start", "end", "begin")
        for unit in ("time", "s", "sec", "seconds", "ms", "frame")
    ),
    *("audio_start", "audio_end", "frame_offset", "num_frames"),
}


def refuse_unsupported_fields(record: dict[str, Any], location: str) -> None:
    """Checks that a record of another tool has no field that asks for more than one clip, one question, one answer.

    Raises:
        UserError: a field holds a system text, other turns, other media, a rejected answer, or a segment of the audio.
    """
    for field, value in record.items():
        if field in UNSUPPORTED_FIELDS and value:
            fault = f"field '{field}' holds {UNSUPPORTED_FIELDS[field]}"
            raise UserError(location, fault, f"remove '{field}', or this row")
        if field in SEGMENT_FIELDS and value:  # a start at 0 is the start of the file
            fault = f"field '{field}' selects a segment of the audio, but whole files are read"
            raise UserError(location, fault, f"cut the audio into a file of its own and remove '{field}'")
    if record.get("label") is False:
        raise UserError(location, "field 'label' marks an unwanted answer (false)", "remove this row")


def single_exchange(turns: list[dict[str, Any]], location: str) -> tuple[str, str]:
    """Returns question and answer of a conversation of one exchange, without the audio placeholder.

    Args:
        turns: turns with `role` and `content` (ms-swift, OpenAI) or `from` and `value` (ShareGPT, Audio Flamingo).

    Raises:
        UserError: a field is missing or is no text, or the conversation cannot be kept as one question and one answer:
            system or tool turns, several exchanges, an answer that is not trained on, or a placeholder elsewhere than
            at the start or end of the question.
    """
    roles, texts = [], []
    for number, turn in enumerate(turns, start=1):
        role, text = _role_and_text(turn, f"{location}: turn {number}")
        if role == "system" and not text.strip():
            continue
        roles.append(role)
        texts.append(text)
    if "system" in roles:
        raise UserError(location, "has a system turn, which is not kept", "remove that turn, or this row")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise UserError(location, "does not alternate between turns of user and assistant", "correct this row")
    if len(roles) > 2:
        fault = f"has {len(roles) // 2} exchanges, but a question is kept without earlier turns"
        raise UserError(location, fault, "make a row of each exchange that can stand alone, or remove this row")
    question, answer = texts
    if PLACEHOLDER.search(answer):
        raise UserError(location, "has an audio placeholder in the answer", "correct this row")
    return _without_placeholder(question, location), answer


def _role_and_text(turn: dict[str, Any], location: str) -> tuple[str, str]:
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, text_key):
        if key not in turn:
            raise missing_field(location, key)
    role, text = turn[role_key], turn[text_key]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(location, f"has the role {role!r}", "keep turns of user and assistant only, or remove this row")
    if not isinstance(text, str):
        fault = f"'{text_key}' is {'a list of parts' if isinstance(text, list) else type(text).__name__}, not text"
        raise UserError(location, fault, "write it as one text, `<audio>` first, with the path in `audios`")
    if ROLES[role] == "assistant" and turn.get("loss", True) in (False, 0):
        raise UserError(location, "is not trained on (`loss: false`)", "remove this row")
    if OTHER_MEDIA.search(text):
        raise UserError(location, "has a placeholder of an image or a video", "remove this row")
    return ROLES[role], text


def _without_placeholder(text: str, location: str) -> str:
    placeholders = list(PLACEHOLDER.finditer(text))
    if len(placeholders) > 1:
        raise UserError(location, f"has {len(placeholders)} audio placeholders for one clip", "correct this row")
    if not placeholders:
        return text.strip()
    start, end = placeholders[0].span()
    before, after = text[:start].strip(), text[end:].strip()
    if before and after:
        fault = f"has the placeholder {placeholders[0].group()} within the question, which would lose its place"
        raise UserError(location, fault, "put it at the start of the question, or remove this row")
    return before or after
