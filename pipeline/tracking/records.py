"""`metrics.jsonl` of an output folder: one record per line, read with care for lines that a crash has damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.core.console import logger

METRICS = "metrics.jsonl"

Record = dict[str, Any]  # step, time, metrics


def parse(lines: Iterable[bytes], path: Path) -> list[Record]:
    """Returns the records of complete lines; skips lines that are none, and reports how many."""
    records, damaged = [], 0
    for line in lines:
        try:
            record = json.loads(line)
            metrics = {str(key): float(value) for key, value in record["metrics"].items()}
            records.append({"step": int(record["step"]), "time": float(record["time"]), "metrics": metrics})
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += 1
    if damaged:
        logger.warning(f"{path}: skipped {damaged} damaged lines, which a crash or a full disk may leave")
    return records


def read_metrics(output: Path, unwritten: bytes = b"") -> list[tuple[int, dict[str, float]]]:
    """Returns every recorded step with its metrics, in order; the last record of a step repeated after a resume.

    Args:
        unwritten: lines that the disk has not accepted yet.
    """
    path = output / METRICS
    steps: dict[int, dict[str, float]] = {}
    content = (path.read_bytes() if path.is_file() else b"") + unwritten
    for record in parse(filter(None, content.split(b"\n")), path):
        steps.setdefault(record["step"], {}).update(record["metrics"])
    return sorted(steps.items())
