"""Reads the records of JSON lines and JSON arrays; refuses JSON of which a text would be lost or changed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import ijson

from data_prep.files import open_utf8
from pipeline.core.errors import UserError

PEEK_BYTES = 4096  # to tell an array from JSON lines
# The first half of a surrogate pair without the second: half of a character.
HALF_CHARACTER = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
SURROGATE = re.compile(rb"\\u[dD][89abAB]")  # found faster
ESCAPE_BYTES = 6


def parse_json(text: str, location: str) -> Any:
    """Parses one JSON value.

    Raises:
        UserError: the text is not JSON, an object has a key twice, or a string holds half of a character; names the
            location.
    """
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = _Object(repeated)
        for key, value in pairs:
            values[key] = value
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(location, f"bad JSON ({error.msg})", "correct this row") from error
    _check_keys(repeated, location)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _half_character(location) from error
    return value


def json_records(path: str) -> Iterator[tuple[str, Any]]:
    """Yields each record of JSON lines or of one JSON array, with its location for error messages.

    Memory is bounded by the largest record, not by the file. The location is `file:line` in JSON lines and
    `file: record N` (from 1) in an array.

    Raises:
        UserError: the file cannot be read or is not valid JSON.
    """
    try:
        with open_utf8(path) as stream:
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
    repeated: list[str] = []
    checked = _CheckedStream(stream, path)
    try:
        records = ijson.items(checked, "item", use_float=True, map_type=lambda: _Object(repeated))
        for number, record in enumerate(records, start=1):
            location = f"{path}: record {number}"
            _check_keys(repeated, location)
            yield location, record
    except ijson.JSONError as error:
        # The first line of the parser's message is its reason, the others draw where it stopped.
        reason, *_ = (
            error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        ).splitlines()
        location = f"{path}: after record {number}" if number else path
        raise UserError(location, f"bad JSON ({reason})", "correct or complete the array") from error


class _Object(dict[str, Any]):
    """A JSON object that adds its repeated keys to a list, because the parser in C cannot pass on an exception."""

    def __init__(self, repeated: list[str]) -> None:
        super().__init__()
        self._repeated = repeated

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self._repeated.append(key)
        super().__setitem__(key, value)


def _check_keys(repeated: list[str], location: str) -> None:
    if repeated:
        raise UserError(location, f"key '{repeated[0]}' occurs twice", "keep one of them")


class _CheckedStream:
    """Reads JSON for a parser that replaces half of a character by a question mark.

    Raises:
        UserError: the stream holds half of a character.
    """

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self._stream = stream
        self._path = path
        self._tail = b""

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        block = self._stream.read(size)
        text = self._tail + block
        for match in HALF_CHARACTER.finditer(text) if SURROGATE.search(text) else ():
            if not block or match.end() + ESCAPE_BYTES <= len(text):
                raise _half_character(self._path)
        self._tail = text[-3 * ESCAPE_BYTES :] if block else b""
        return block


def _half_character(location: str) -> UserError:
    return UserError(location, r"holds half of a character (such as \ud83d alone)", "correct that text")
