"""The output folder of a run: names of its files, the run that owns it, and the identity of that run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import ExperimentConfig
from pipeline.config.flat import flatten
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write
from pipeline.core.records import Strict
from pipeline.training.checkpoint_dir import list_checkpoints

RUN = "run.json"
RESULTS = "train.json"  # results of a finished run, written last
CONFIG = "config.yaml"  # the resolved config, in every checkpoint and in the output folder
LOCK = ".lock"  # held with `files.lock_folder` by the job that writes into the folder
LOCK_PATIENCE_S = 3.0  # the ranks of a killed job need a moment to notice
# Settings that may differ between two starts of one run, because they do not change what it computes.
_FREE = (
    "output",
    "starts_from",
    "tracking",
    "data.cache",
    "data.cache_gib",
    "data.max_unfit_fraction",
    "data.unfit_questions",
    "data.workers",
    "train.checkpoint",
    "train.collective_timeout_s",
    "train.evaluate_every_steps",
    "train.log_every_steps",
    "train.max_skipped_steps",
    "train.peak_tflops",
)


def run_identity(config: ExperimentConfig, fingerprint: str, origin: str | None) -> dict[str, Any]:
    """Returns the settings that change what a run computes, with flat keys.

    Args:
        fingerprint: fingerprint of the training features.
        origin: identity of the run that it starts from.
    """
    values = flatten(config.model_dump(mode="json"))
    fixed = {k: v for k, v in values.items() if not any(k == f or k.startswith(f"{f}.") for f in _FREE)}
    return {**fixed, "features.fingerprint": fingerprint, "origin": origin}


class RunRecord(Strict):
    """`run.json` of an output folder.

    Attributes:
        identity: settings that change what the run computes, from `run_identity`; others may differ between starts.
        run_id: id of the MLflow run; None until the server has answered.
    """

    identity: dict[str, Any]
    run_id: str | None = None

    @property
    def sha256(self) -> str:
        """Hash of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def read_run(output: Path) -> RunRecord | None:
    """Returns the run that owns an output folder, or None.

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
    """Makes a run the owner of an output folder, which is created if necessary."""
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / RUN, f"{record.model_dump_json(indent=1)}\n".encode())


def identity_of(output: Path | None) -> str | None:
    """Returns the hash that identifies the run of an output folder; None if there is no run yet."""
    run = None if output is None else read_run(output)
    return None if run is None else run.sha256


def is_finished(output: Path) -> bool:
    """Returns whether an output folder holds a run that reached its last step."""
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
        configured, recorded = identity.get(key), owner.identity.get(key)
        if configured != recorded:
            fault = f"belongs to another run: {key} is {recorded!r} there and {configured!r} in this config"
            raise UserError(output, fault, "choose another output folder, or remove this one")
