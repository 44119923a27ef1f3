"""Writes runs to MLflow. Training never waits for MLflow and never fails because of it.

Every record is appended to `<output>/metrics.jsonl` first. A thread sends that file to MLflow and stores its progress
in `<output>/tracking.json`. The file is the queue: records that a dead server did not accept are sent at the
next start. `pipeline.tracking.reader` reads runs; no other package imports mlflow."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config import TrackingConfig
from pipeline.core.files import atomic_write
from pipeline.tracking.shipper import METRICS, STATE, RunDescription, Shipper, Status, tracking_uri

__all__ = [
    "CORRECTNESS", "EVALUATIONS", "MACHINE_TAG", "METRICS", "STATE", "SWEEP", "RunDescription", "Status", "Tracker",
    "close_parent", "end_run", "log_evaluation", "open_parent", "reach", "read_metrics", "tracking_uri",
]  # fmt: skip

PARENT = "parent_run"  # file of an output folder: the id of the run that `open_parent` created
EVALUATIONS = "evaluation"  # artifact folder of a run: the scores of each benchmark as <benchmark>.json
CORRECTNESS = "correctness"  # artifact folder of a run: which questions were answered correctly, as <benchmark>.json
SWEEP = "sweep.yaml"  # artifact of a sweep's run: its resolved config
MACHINE_TAG = "pal.machine"  # tag of a sweep's run
SHIP_EVERY_S = 2.0
RETRY_EVERY_S = 15.0
EXIT_WAIT_S = 20.0
_MAX_REASON_LENGTH = 120


def read_metrics(output: Path) -> list[tuple[int, dict[str, float]]]:
    """Returns every recorded step with its metrics, in order; the last record of a step repeated after a resume."""
    steps: dict[int, dict[str, float]] = {}
    for line in (output / METRICS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {}).update(record["metrics"])
    return sorted(steps.items())


class Tracker:
    """Records one run; only rank 0 has a tracker.

    Args:
        config: where and under which name the run is recorded.
        output: output folder of the run.
        run_id: id of the run to resume; None starts a new one.
        description: parameters, tags and artifacts of the run.
        on_run_id: called from the shipping thread as soon as the run has an id.

    Attributes:
        run_id: id of the run; None until MLflow has assigned one.
        failure: why the last attempt to reach MLflow failed; None if it succeeded.
        uploading: folder that is being uploaded, which must not be removed meanwhile.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output: Path,
        *,
        run_id: str | None,
        description: RunDescription,
        on_run_id: Callable[[str], None],
    ) -> None:
        self.run_id = run_id
        self.failure: str | None = None
        self.uploading: Path | None = None
        self._folders: Sequence[Path] = ()
        self._config, self._output = config, output
        self._description, self._on_run_id = description, on_run_id
        output.mkdir(parents=True, exist_ok=True)
        _remove_truncated_record(output / METRICS)
        self._file = (output / METRICS).open("ab", buffering=0)
        self._unwritten = b""
        self._machine_metrics: dict[str, float] = {}
        self._status: Status | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._ship, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of an optimizer step with the machine's latest metrics; returns at once."""
        record = {"step": step, "time": round(time.time(), 3), "metrics": {**metrics, **self._machine_metrics}}
        self._unwritten += json.dumps(record).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk must not end the run; the next record tries again
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def log_folders(self, folders: Sequence[Path]) -> None:
        """Stores these folders with the run, except those already stored or removed before they can be uploaded.

        Returns at once. The list replaces that of an earlier call.
        """
        self._folders = list(folders)

    def close(self, status: Status) -> bool:
        """Ends the run. Waits at most `EXIT_WAIT_S` for the server, and for an upload until it ends.

        Returns:
            False if something remains to be sent at the next start.
        """
        self._file.close()
        self._status = status
        self._wake.set()
        self._thread.join(EXIT_WAIT_S)
        while self._thread.is_alive() and self.uploading is not None:
            self._thread.join(1.0)
        return not self._thread.is_alive() and self.failure is None

    def _ship(self) -> None:
        shipper = Shipper(self._config, self._output)
        opened = False
        while True:
            status = self._status
            try:
                if not opened:
                    self.run_id = shipper.open_run(self.run_id, self._description)
                    self._on_run_id(self.run_id)
                    opened = True
                self._machine_metrics = shipper.machine_metrics()
                shipper.send_new_records()
                if status is not None:
                    shipper.end_run(status)
                for folder in self._folders:
                    self.uploading = folder
                    shipper.send_folder(folder)
                self.failure = None
            except Exception as error:  # MLflow raises errors of many libraries, and none of them may stop a run
                reason = str(error).partition("\n")[0][:_MAX_REASON_LENGTH]
                self.failure = f"{type(error).__name__}: {reason}"
            self.uploading = None
            if status is not None:
                return
            self._wake.wait(SHIP_EVERY_S if self.failure is None else RETRY_EVERY_S)


def _remove_truncated_record(path: Path) -> None:
    """Removes a last line without a line end, which a killed process may leave."""
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def end_run(config: TrackingConfig, output: Path, run_id: str, status: Status) -> None:
    """Sends the remaining records of a run whose process no longer exists, and sets its status."""
    shipper = Shipper(config, output)
    shipper.attach(run_id)
    shipper.send_new_records()
    shipper.end_run(status)


def log_evaluation(
    config: TrackingConfig, output: Path, run_id: str, scores: Mapping[str, float], artifacts: Mapping[str, str]
) -> None:
    """Adds scores, and texts such as whole results, to a trained model's run. May raise what MLflow raises."""
    shipper = Shipper(config, output)
    for name, value in scores.items():
        shipper.client.log_metric(run_id, name, value)
    for name, text in artifacts.items():
        shipper.client.log_text(run_id, text, name)


def reach(config: TrackingConfig) -> None:
    """Requests an experiment from the tracking server, if one is configured. May raise what MLflow raises."""
    if config.uri is not None and config.uri.startswith("http"):
        Shipper(config, Path()).client.get_experiment("0")


def open_parent(config: TrackingConfig, output: Path, sweep: str, machine: str) -> str:
    """Starts the run under which MLflow shows the trials of a sweep, or resumes the one of this output folder.

    May raise what MLflow raises.

    Args:
        sweep: the resolved sweep file.
        machine: description of the machine on which the trials run.
    """
    shipper, file = Shipper(config, output), output / PARENT
    known = file.read_text(encoding="utf-8") if file.is_file() else None
    description = RunDescription(tags={"pal.kind": "sweep", MACHINE_TAG: machine}, artifacts={SWEEP: sweep})
    run_id = shipper.open_run(known, description)
    atomic_write(file, run_id.encode())
    return run_id


def close_parent(config: TrackingConfig, output: Path, run_id: str, status: Status) -> None:
    """Sets the status of a parent run. May raise what MLflow raises."""
    shipper = Shipper(config, output)
    shipper.attach(run_id)
    shipper.end_run(status)
