"""Checkpoint directories: atomic, self-describing, verified before use. Does not know what the files contain.

A checkpoint is `step-000600/` with a `COMPLETE.json` that lists every file with size and hash. It is written under a
temporary name and renamed last, so a directory of that name was complete; if its files have changed since, it is
skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.core.console import logger
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write, fsync
from pipeline.core.records import Strict
from pipeline.core.units import GIB

RECORD = "COMPLETE.json"
VALIDATION = "validation.json"  # validation loss of a checkpoint; written after it, while training continues
FORMAT_VERSION: Literal[3] = 3
_NAME = re.compile(r"step-(\d{6,})")
_SPACE_MARGIN = 1.01  # files hold a little more than tensors


class FileRecord(Strict):
    """Size in bytes and hash of a file."""

    size: int
    sha256: str


class CheckpointRecord(Strict):
    """`COMPLETE.json`.

    Attributes:
        step: optimizer steps taken.
        world_size: number of ranks that wrote it.
        zero_stage: ZeRO stage of the engine that wrote it.
        config_sha256: identity of the run; see `RunRecord`.
        data: position of the loader, as `TrainingLoader.state_dict` returns it.
        progress: counters of the trainer that a resumed run continues.
        checksums: hashes of the parameters from `Engine.checksums`; compared after loading.
        run_id: id of the MLflow run; None while the server has not answered.
        versions: versions of the packages that wrote it.
        files: path inside the directory -> size and hash.
    """

    format_version: Literal[3] = FORMAT_VERSION
    step: int
    world_size: int
    zero_stage: int
    config_sha256: str
    data: dict[str, Any]
    progress: dict[str, float]
    checksums: dict[str, str]
    run_id: str | None
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def fits(self, world_size: int) -> bool:
        """Returns whether this number of ranks can load it unconverted; without ZeRO every rank holds everything."""
        return self.zero_stage == 0 or self.world_size == world_size


class UnsupportedFormatError(UserError):
    """A checkpoint was written in the format of another version of this software."""


def checkpoint_name(step: int) -> str:
    """Returns the directory name of the checkpoint of `step`."""
    return f"step-{step:06d}"


def begin(folder: Path, step: int) -> Path:
    """Creates an empty temporary directory for the checkpoint of `step`; removes those of interrupted saves."""
    for interrupted in folder.glob(".step-*.tmp"):
        shutil.rmtree(interrupted)
    temporary = temporary_path(folder, step)
    temporary.mkdir(parents=True)
    return temporary


def temporary_path(folder: Path, step: int) -> Path:
    """Returns the directory of the checkpoint of `step` while it is being written."""
    return folder / f".{checkpoint_name(step)}.tmp"


def files_of(temporary: Path) -> list[str]:
    """Returns the relative paths of all files below, sorted, so that ranks can divide them among themselves."""
    return sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())


def measure(temporary: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Forces files to disk and returns their sizes and hashes."""
    records = {}
    for name in names:
        fsync(temporary / name)
        records[name] = _measure_file(temporary / name)
    return records


def commit(temporary: Path, record: CheckpointRecord) -> Path:
    """Writes `COMPLETE.json` and gives the directory its final name; from then on the checkpoint survives a crash."""
    atomic_write(temporary / RECORD, f"{record.model_dump_json(indent=1)}\n".encode())
    final = temporary.parent / checkpoint_name(record.step)
    if final.exists():  # it can only be damaged: training would have resumed from an intact one
        shutil.rmtree(final)
    temporary.rename(final)
    fsync(final.parent)
    return final


def discard(temporary: Path) -> None:
    """Removes a failed save, to free its space."""
    shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the committed checkpoints, newest first, without verifying them."""
    if not folder.is_dir():
        return []
    named = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / RECORD).is_file()]
    return [path for _, path in sorted(named, reverse=True)]


def read_record(checkpoint: Path) -> CheckpointRecord:
    """Reads the record of a checkpoint.

    Raises:
        UnsupportedFormatError: another version of this software wrote it.
        UserError: it is not a complete checkpoint.
    """
    try:
        values = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            fault = f"has checkpoint format {version}, and this version of pal-pipeline reads format {FORMAT_VERSION}"
            remedy = "use the version that wrote it, or start a new run in another output folder"
            raise UnsupportedFormatError(checkpoint, fault, remedy)
        return CheckpointRecord.model_validate(values)
    except (OSError, ValueError, ValidationError) as error:
        fault = f"is not a complete checkpoint ({str(error).splitlines()[0]})"
        raise UserError(checkpoint, fault, "give a step-* folder that a training run wrote") from error


def verify(checkpoint: Path) -> CheckpointRecord:
    """Reads every file and compares it with the record.

    Raises:
        UserError: a file is missing, has another size or another hash.
    """
    record = read_record(checkpoint)
    for name, expected in record.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(path, "is missing from the checkpoint", "use an older checkpoint")
        if path.stat().st_size != expected.size or _measure_file(path) != expected:
            raise UserError(path, "is damaged: size or hash differs from its record", "use an older checkpoint")
    return record


def newest_intact(folder: Path) -> tuple[Path, CheckpointRecord] | None:
    """Returns the newest intact checkpoint, or None; logs a warning for each damaged one that it skips.

    Raises:
        UnsupportedFormatError: another version of this software wrote it, and its progress must not be overwritten.
    """
    for checkpoint in list_checkpoints(folder):
        try:
            return checkpoint, verify(checkpoint)
        except UnsupportedFormatError:
            raise
        except UserError as error:
            logger.warning(f"{error}; going back to the checkpoint before")
    return None


def space_error(folder: Path, num_bytes: float) -> str | None:
    """Returns a sentence that says why `num_bytes` do not fit on a folder's disk, or None if they fit."""
    free = shutil.disk_usage(folder).free
    if free > num_bytes * _SPACE_MARGIN:
        return None
    return f"it needs {num_bytes / GIB:.3f} GiB and {folder} has {free / GIB:.3f} GiB free"


def record_validation_loss(checkpoint: Path, loss: float) -> None:
    """Writes the validation loss of a checkpoint into it, for `retain`."""
    atomic_write(checkpoint / VALIDATION, f"{json.dumps({'loss': loss})}\n".encode())


def best_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints that have a finite validation loss, lowest first."""
    files = [path / VALIDATION for path in list_checkpoints(folder)]
    losses = {file.parent: json.loads(file.read_text(encoding="utf-8"))["loss"] for file in files if file.is_file()}
    return sorted((path for path in losses if math.isfinite(losses[path])), key=lambda path: losses[path])


def retain(folder: Path, keep: int, keep_best: int = 0, in_use: Collection[Path] = ()) -> None:
    """Removes all checkpoints except the newest `keep`, the best `keep_best` and those `in_use`."""
    retained = {*list_checkpoints(folder)[:keep], *best_checkpoints(folder)[:keep_best], *in_use}
    for checkpoint in list_checkpoints(folder):
        if checkpoint not in retained:
            # The record first: an interrupted removal must not leave a directory that looks complete.
            (checkpoint / RECORD).unlink()
            shutil.rmtree(checkpoint)


def _measure_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def require_resumable(output: Path, world_size: int, *, reshard: bool) -> None:
    """Checks that the newest checkpoint, if there is one, can be resumed by this number of ranks.

    Args:
        reshard: whether a checkpoint of another number of ranks may be converted.

    Raises:
        UserError: another number of ranks, or another version of this software, wrote it.
    """
    for newest in list_checkpoints(output)[:1]:
        try:
            record = read_record(newest)
        except UserError as error:
            if reshard and not isinstance(error, UnsupportedFormatError):
                return  # damaged: `newest_intact` falls back to the previous one
            raise
        if not reshard and not record.fits(world_size):
            raise world_size_error(newest, record.world_size, world_size)


def world_size_error(checkpoint: Path, written_by: int, world_size: int) -> UserError:
    """Returns the error for a checkpoint that another number of ranks wrote, where resharding was not requested."""
    fault = f"was written by {written_by} ranks, this job has {world_size}"
    return UserError(checkpoint, fault, f"add --reshard to convert it, or resume with {written_by} ranks (--nproc)")
