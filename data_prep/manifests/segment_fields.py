"""Finds the segment of the audio that the fields of a record select, by the names that corpora use for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from data_prep.manifests.unsupported import Unsupported

_SECONDS = ("", "_s", "_sec", "_seconds", "_time")
START_FIELDS = {f"{edge}{unit}": 1.0 for edge in ("start", "begin", "audio_start", "offset") for unit in _SECONDS}
END_FIELDS = {f"{edge}{unit}": 1.0 for edge in ("end", "audio_end") for unit in _SECONDS}
START_FIELDS |= dict.fromkeys(("start_ms", "begin_ms", "offset_ms", "start_time_ms"), 0.001)
END_FIELDS |= dict.fromkeys(("end_ms", "end_time_ms"), 0.001)
# The length of the segment beside a start; alone it is the length of the file.
DURATION_FIELDS = {**{f"duration{unit}": 1.0 for unit in _SECONDS}, "duration_ms": 0.001}
REFUSED_FIELDS = {
    **dict.fromkeys(
        ("start_frame", "begin_frame", "end_frame", "frame_offset", "num_frames"), "selects a segment in frames"
    ),
    **dict.fromkeys(("segment", "segments", "timestamps"), "lists segments of the audio"),
}


def segment_of(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns start and end in seconds of the segment that a record selects; None where it names none.

    Raises:
        Unsupported: the record selects a segment in frames or in a list, names an edge twice with different values, or
            the value of a field is not a number.
    """
    for field, fault in REFUSED_FIELDS.items():
        if record.get(field) not in (None, "", 0, -1, [], {}):
            raise Unsupported(f"field '{field}' {fault}, not in seconds by a start and an end")
    start = _time(record, START_FIELDS)
    end = _time(record, END_FIELDS)
    if start is not None and end is None:
        duration = _time(record, DURATION_FIELDS)
        if duration is not None and duration != -1:  # NeMo's value for the rest of the file
            end = start + duration
    return start or None, end  # 0 is the start of the file


def _time(record: Mapping[str, Any], fields: dict[str, float]) -> float | None:
    """Returns the time that one of these fields holds, each with its unit in seconds."""
    times: dict[str, float] = {}
    for field, unit in fields.items():
        value = record.get(field)
        if value is None or value == "":
            continue
        try:
            seconds = math.nan if isinstance(value, bool) else float(value) * unit
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds):
            raise Unsupported(f"field '{field}' is {value!r}, not one time as a number")
        times[field] = seconds
    if len(set(times.values())) > 1:
        raise Unsupported(f"fields {' and '.join(map(repr, times))} select different segments")
    return next(iter(times.values()), None)
