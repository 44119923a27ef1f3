"""The folder of a synthetic corpus: appears under its name when it is complete, and an interrupted run resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError

RECORD = "synth.json"  # in a finished corpus
STAMP = "settings.json"  # in an unfinished corpus
KIND = "text"  # setting of a corpus of text alone


def read_finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the content of `synth.json` of a finished corpus, or None if there is nothing at `out`.

    Raises:
        UserError: `out` holds something else, or a corpus with other settings.
    """
    finished = _read_record(out)
    if finished is not None:
        if any(finished.get(key) != settings.get(key) for key in {*settings, KIND}):
            raise UserError(out, "holds a corpus with other settings", "choose another folder, or remove this one")
        return finished
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "is not empty and not a finished corpus", "choose another folder")
    return None


def _read_record(out: Path) -> dict[str, Any] | None:
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(path, f"is damaged ({error})", "remove the folder") from error
    if not isinstance(record, dict):
        raise UserError(path, "is damaged (not a table)", "remove the folder")
    return record


def start(out: Path, settings: Mapping[str, Any]) -> Path:
    """Returns the working folder `.NAME.unfinished`, emptied unless it is from a run with these settings.

    Raises:
        UserError: it cannot be written.
    """
    work_dir = out.parent / f".{out.name}.unfinished"
    stamp = work_dir / STAMP
    settings_text = json.dumps(settings)
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == settings_text):
        shutil.rmtree(work_dir, ignore_errors=True)
        try:
            work_dir.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                work_dir.parent, f"cannot be written ({error.strerror})", "choose another folder"
            ) from error
        write(stamp, settings_text.encode())
    return work_dir


def finish(work_dir: Path, out: Path, record: Mapping[str, Any]) -> None:
    """Writes `synth.json` and gives the working folder its name."""
    write(work_dir / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    (work_dir / STAMP).unlink()
    work_dir.rename(out)  # also replaces an empty folder


def write(path: Path, data: bytes) -> None:
    """Writes to a temporary name first, so that a file under its final name is always complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
