"""Writes and reads the address of a part of an audio file: `a.flac#t=3,5.5`, a media fragment of the W3C in seconds."""

from __future__ import annotations

import re

_FRAGMENT = re.compile(r"(?P<path>.+)#t=(?:npt:)?(?P<start>\d+(?:\.\d*)?)?(?:,(?P<end>\d+(?:\.\d*)?))?")


def with_fragment(path: str, start_s: float | None, end_s: float | None) -> str:
    """Returns the address of the part between two times; the path itself for the whole file.

    Args:
        start_s, end_s: seconds from the beginning of the file; None means its beginning and its end.
    """
    if start_s is None and end_s is None:
        return path
    end = "" if end_s is None else f",{_seconds(end_s)}"
    return f"{path}#t={'' if start_s is None else _seconds(start_s)}{end}"


def split_fragment(address: str) -> tuple[str, float | None, float | None]:
    """Returns path, start and end of an address; None for a time that it does not name."""
    match = _FRAGMENT.fullmatch(address)
    if match is None or (match["start"] is None and match["end"] is None):
        return address, None, None
    start, end = (None if match[edge] is None else float(match[edge]) for edge in ("start", "end"))
    return match["path"], start, end


def _seconds(value: float) -> str:
    """Returns the shortest text of a time to the microsecond, which is finer than a sample at any usual rate."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
