"""The output folder of a run: what it is called, which run owns it, who is writing into it now."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from pipeline.config import ExperimentConfig
from pipeline.config.flat import flatten
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write
from pipeline.core.records import Strict
from pipeline.training.checkpoint_dir import list_checkpoints

RUN = "run.json"
RESULTS = "train.json"  # figures of a finished run, written last
CONFIG = "config.yaml"  # the resolved config, in every checkpoint and in the output folder
LOCK = ".lock"
LOCK_PATIENCE_S = 3.0  # the ranks of a killed job need a moment to notice
# Settings that may differ between two starts of one run: they change how it is watched, kept or fed, not what it is.
_FREE = (
    "output",
    "starts_from",
    "tracking",
    "data.cache",
    "data.cache_gib",
    "data.workers",
    "train.checkpoint",
    "train.collective_timeout_s",
    "train.evaluate_every_steps",
    "train.log_every_steps",
    "train.max_skipped_steps",
    "train.peak_tflops",
)


def run_identity(config: ExperimentConfig, fingerprint: str, origin: str | None) -> dict[str, Any]:
    """Flat settings that change what a run computes.

    Args:
        fingerprint: of the features that it is trained on.
        origin: identity of the run that it starts from.
    """
    values = flatten(config.model_dump(mode="json"))
    kept = {k: v for k, v in values.items() if not any(k == f or k.startswith(f"{f}.") for f in _FREE)}
    return {**kept, "features.fingerprint": fingerprint, "origin": origin}


class RunRecord(Strict):
    """`run.json` of an output folder.

    Attributes:
        identity: every setting that changes what is computed, as flat keys. Settings that only change how the run is
            watched or kept may differ between starts.
        run_id: of MLflow; None until the server has answered.
    """

    identity: dict[str, Any]
    run_id: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def read_run(output: Path) -> RunRecord | None:
    """The run that owns an output folder, or None.

    Raises:
        UserError: the record is damaged.
    """
    path = output / RUN
    if not path.exists():
        return None
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        fault = f"is damaged ({str(error).splitlines()[0]})"
        raise UserError(path, fault, "choose another output folder") from error


def write_run(output: Path, record: RunRecord) -> None:
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / RUN, f"{record.model_dump_json(indent=1)}\n".encode())


def identity_of(output: Path | None) -> str | None:
    """What tells the run in an output folder from all others; None before there is one."""
    run = None if output is None else read_run(output)
    return None if run is None else run.sha256


def is_finished(output: Path) -> bool:
    """Whether an output folder holds a run that went on to its last step."""
    return (output / RESULTS).is_file() and bool(list_checkpoints(output))


def require_same_run(output: Path, identity: dict[str, Any]) -> None:
    """Checks that an output folder is new, or belongs to a run with these settings.

    Raises:
        UserError: it belongs to another run, or holds something else.
    """
    owner = read_run(output)
    if owner is None:
        if list_checkpoints(output):
            raise UserError(output, f"holds checkpoints but no {RUN}", "choose another output folder")
        return
    for key in sorted(identity.keys() | owner.identity.keys()):
        here, there = identity.get(key), owner.identity.get(key)
        if here != there:
            fault = f"belongs to another run: {key} is {there!r} there and {here!r} in this config"
            raise UserError(output, fault, "choose another output folder, or remove this one")


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Holds an output folder. The system releases it with the process, however that ends.

    Raises:
        UserError: another process holds it, and still does after `LOCK_PATIENCE_S`.
    """
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    with (output / LOCK).open("a+", encoding="utf-8") as file:
        while not _take(file):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(output, f"is in use by {holder}", "wait for it, or choose another output folder")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
