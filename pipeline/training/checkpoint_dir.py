"""Checkpoint directories: atomic, self-describing, verified before use. Knows nothing of what the files hold.

A checkpoint is `step-000600/` with a `COMPLETE.json` that lists every file with size and hash. It is written under a
temporary name and renamed last, so a directory of that name is whole; one whose files have changed since is skipped."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write, fsync
from pipeline.core.records import Strict

RECORD = "COMPLETE.json"
VALIDATION = "validation.json"  # the validation loss of a checkpoint; written after it, as training goes on
_NAME = re.compile(r"step-(\d{6,})")
_GIB = 2**30
_SPACE_MARGIN = 1.01  # what files hold beside tensors


class FileRecord(Strict):
    size: int
    sha256: str


class CheckpointRecord(Strict):
    """`COMPLETE.json`.

    Attributes:
        step: optimizer steps done.
        config_sha256: identity of the run; see `RunRecord`.
        data: where the loader stands, in its own words.
        progress: counters of the trainer that go on after a resume.
        checksums: of the parameters, in the engine's own words; compared after loading.
        run_id: of MLflow; None while the server has not answered.
        versions: packages that wrote it.
        files: path inside the directory -> size and hash.
    """

    format_version: Literal[2] = 2
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
        """Whether this number of ranks can load it as it is; without ZeRO every rank holds all."""
        return self.zero_stage == 0 or self.world_size == world_size


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def begin(folder: Path, step: int) -> Path:
    """An empty temporary directory for the checkpoint of `step`; what an interrupted save left is removed."""
    for left_over in folder.glob(".step-*.tmp"):
        shutil.rmtree(left_over)
    temporary = temporary_path(folder, step)
    temporary.mkdir(parents=True)
    return temporary


def temporary_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is while it is written."""
    return folder / f".{checkpoint_name(step)}.tmp"


def files_of(temporary: Path) -> list[str]:
    """Every file below, as sorted relative paths, so that ranks can share the work of `measure`."""
    return sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())


def measure(temporary: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Forces files to disk and records size and hash."""
    records = {}
    for name in names:
        fsync(temporary / name)
        records[name] = _measure_file(temporary / name)
    return records


def commit(temporary: Path, record: CheckpointRecord) -> Path:
    """Writes `COMPLETE.json` and gives the directory its name; after this returns the checkpoint survives anything."""
    atomic_write(temporary / RECORD, f"{record.model_dump_json(indent=1)}\n".encode())
    final = temporary.parent / checkpoint_name(record.step)
    if final.exists():  # only a damaged one can be here: a whole one would have been resumed from
        shutil.rmtree(final)
    temporary.rename(final)
    fsync(final.parent)
    return final


def discard(temporary: Path) -> None:
    """Removes a save that failed, to give its space back."""
    shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first; nothing is verified."""
    if not folder.is_dir():
        return []
    named = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / RECORD).is_file()]
    return [path for _, path in sorted(named, reverse=True)]


def read_record(checkpoint: Path) -> CheckpointRecord:
    """What a checkpoint says of itself.

    Raises:
        UserError: not a complete checkpoint of this format.
    """
    try:
        return CheckpointRecord.model_validate_json((checkpoint / RECORD).read_text(encoding="utf-8"))
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


def newest_good(folder: Path, warn: Callable[[str], None]) -> tuple[Path, CheckpointRecord] | None:
    """The newest checkpoint that verifies; each damaged one that is passed over is told through `warn`."""
    for checkpoint in list_checkpoints(folder):
        try:
            return checkpoint, verify(checkpoint)
        except UserError as error:
            warn(f"{error}; going back to the checkpoint before")
    return None


def lacking_space(folder: Path, num_bytes: float) -> str | None:
    """Why `num_bytes` do not fit into a folder's disk; None when they do."""
    free = shutil.disk_usage(folder).free
    if free > num_bytes * _SPACE_MARGIN:
        return None
    return f"it needs {num_bytes / _GIB:.3f} GiB and {folder} has {free / _GIB:.3f} GiB free"


def record_validation_loss(checkpoint: Path, loss: float) -> None:
    """Writes into a checkpoint how good it is, for `retain`."""
    atomic_write(checkpoint / VALIDATION, f"{json.dumps({'loss': loss})}\n".encode())


def best_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have a finite validation loss, lowest first."""
    files = [path / VALIDATION for path in list_checkpoints(folder)]
    losses = {file.parent: json.loads(file.read_text(encoding="utf-8"))["loss"] for file in files if file.is_file()}
    return sorted((path for path in losses if math.isfinite(losses[path])), key=lambda path: losses[path])


def retain(folder: Path, keep: int, keep_best: int = 0, in_use: Collection[Path] = ()) -> None:
    """Removes all checkpoints but the newest `keep`, the best `keep_best` and those `in_use`."""
    kept = {*list_checkpoints(folder)[:keep], *best_checkpoints(folder)[:keep_best], *in_use}
    for checkpoint in list_checkpoints(folder):
        if checkpoint not in kept:
            # The record goes first: a removal that is interrupted leaves no directory that looks complete.
            (checkpoint / RECORD).unlink()
            shutil.rmtree(checkpoint)


def _measure_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def require_world_size(output: Path, world_size: int) -> None:
    """Checks that the newest checkpoint, if there is one, can be resumed by this number of ranks.

    Raises:
        UserError: another number wrote it.
    """
    for newest in list_checkpoints(output)[:1]:
        if not (record := read_record(newest)).fits(world_size):
            raise other_world_size(newest, record.world_size, world_size)


def other_world_size(checkpoint: Path, written_by: int, world_size: int) -> UserError:
    """What to say when another number of ranks wrote a checkpoint, and nobody asked to reshard it."""
    fault = f"was written by {written_by} ranks, this job has {world_size}"
    return UserError(checkpoint, fault, f"add --reshard to convert it, or resume with {written_by} ranks (--nproc)")
