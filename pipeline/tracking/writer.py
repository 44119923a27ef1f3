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
from pipeline.core.console import logger
from pipeline.core.files import atomic_write
from pipeline.tracking import records, store
from pipeline.tracking.records import METRICS, read_metrics
from pipeline.tracking.shipper import STATE, RunDescription, Shipper, Status
from pipeline.tracking.store import tracking_uri

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
LOCAL_EXIT_WAIT_S = 300.0  # a database file answers, but other runs may write to it or the machine may be busy


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
        failure: why the last attempt to send everything to MLflow failed, as a sentence; None if it succeeded.
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
        self._unwritten, self._write_failed = b"", False
        self._opened = self._described = self._texts_sent = False
        self._machine_metrics: dict[str, float] = {}
        self._status: Status | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._ship, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of an optimizer step with the machine's latest metrics; returns at once."""
        record = {"step": step, "time": round(time.time(), 3), "metrics": {**metrics, **self._machine_metrics}}
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:  # a full disk must not end the run; the next record tries again
            if not self._write_failed:
                logger.warning(f"{self._output / METRICS} cannot be written ({error.strerror}); trying again later")
            self._write_failed = True

    def read_metrics(self) -> list[tuple[int, dict[str, float]]]:
        """Returns every recorded step with its metrics, also those that the disk has not accepted yet."""
        return records.read_metrics(self._output, self._unwritten)

    def log_folders(self, folders: Sequence[Path]) -> None:
        """Stores these folders with the run, except those already stored or removed before they can be uploaded.

        Returns at once. The list replaces that of an earlier call.
        """
        self._folders = list(folders)

    def close(self, status: Status) -> bool:
        """Ends the run. Waits at most `EXIT_WAIT_S` for a server, `LOCAL_EXIT_WAIT_S` for a database file, and for an
        upload until it ends.

        Returns:
            False if something remains to be sent at the next start.
        """
        self._write()
        with contextlib.suppress(OSError):
            self._file.close()
        self._status = status
        self._wake.set()
        is_local = store.database_path(tracking_uri(self._config, self._output)) is not None
        self._thread.join(LOCAL_EXIT_WAIT_S if is_local else EXIT_WAIT_S)
        while self._thread.is_alive() and self.uploading is not None:
            self._thread.join(1.0)
        if self._thread.is_alive() and self.failure is None:
            self.failure = "MLflow has not answered yet"
        if self._unwritten and self.failure is None:
            self.failure = f"the last records are not in {self._output / METRICS}, which could not be written"
        return self.failure is None

    def _ship(self) -> None:
        shipper = Shipper(self._config, self._output)
        while True:
            status = self._status
            try:
                self._send(shipper, status)
                self.failure = None
            except Exception as error:  # MLflow raises errors of many libraries, and none of them may stop a run
                failure = store.describe_fault(error, shipper.uri)
                if failure != self.failure and status is None:
                    logger.warning(f"{failure}; the run goes into {METRICS} and is sent when that is corrected")
                self.failure = failure
            self.uploading = None
            if status is not None:
                return
            self._wake.wait(SHIP_EVERY_S if self.failure is None else RETRY_EVERY_S)

    def _send(self, shipper: Shipper, status: Status | None) -> None:
        """Sends what is new. What has succeeded is not repeated, so that a later failure cannot create a second run."""
        if not self._opened:
            self.run_id = shipper.open_run(self.run_id)
            self._on_run_id(self.run_id)
            self._opened = True
        if not self._described:
            shipper.describe(self._description)
            self._described = True
        self._machine_metrics = shipper.machine_metrics()
        shipper.send_new_records()
        if status is not None:
            shipper.end_run(status)
        if self._description.artifacts and not self._texts_sent:  # last: their store may be away while MLflow answers
            shipper.send_texts(self._description.artifacts)
            self._texts_sent = True
        for folder in self._folders:
            self.uploading = folder
            shipper.send_folder(folder)


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
    shipper.attach(run_id)
    shipper.send_scores(scores)
    shipper.send_texts(artifacts)


def reach(config: TrackingConfig, output: Path) -> None:
    """Asks the tracking store for the experiment, without writing. May raise what MLflow raises.

    Raises:
        UserError: the experiment is deleted.
    """
    shipper = Shipper(config, output)
    database = store.database_path(shipper.uri)
    if database is not None and not database.is_file():
        return
    experiment = shipper.client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        store.require_active(experiment.lifecycle_stage, experiment.name, experiment.experiment_id, shipper.uri)


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
    run_id = shipper.open_run(known)
    atomic_write(file, run_id.encode())
    shipper.describe(description)
    shipper.send_texts(description.artifacts)
    return run_id


def close_parent(config: TrackingConfig, output: Path, run_id: str, status: Status) -> None:
    """Sets the status of a parent run. May raise what MLflow raises."""
    shipper = Shipper(config, output)
    shipper.attach(run_id)
    shipper.end_run(status)
