"""The one door to MLflow for writing. Training never waits for it and never fails because of it.

Every record is appended to `<output>/metrics.jsonl` first; a thread ships that file to MLflow and remembers how far it
came in `<output>/tracking.json`. The file is the queue: what a dead server did not take is sent by the next start."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import TrackingConfig, default_tracking_uri
from pipeline.core.files import atomic_write

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

METRICS = "metrics.jsonl"
STATE = "tracking.json"
PARENT = "parent_run"  # file of an output folder: the id of the run that `open_parent` made
EVALUATIONS = "evaluation"  # artifacts of a run: one <benchmark>.json each, from `pal evaluate` to `pal report`
MACHINE_TAG = "pal.machine"  # of a sweep's run
SWEEP = "sweep.yaml"  # artifact of a sweep's run: its resolved config
CORRECTNESS = "verdicts"  # likewise, which questions were answered right
FOLDERS = "checkpoints"  # artifacts of a run: the folders of `Tracker.log_folders`
SHIP_EVERY_S = 2.0
RETRY_EVERY_S = 15.0
EXIT_WAIT_S = 20.0
_RECORDS_PER_CALL = 200
_LONGEST_REASON = 120
_LONGEST_VALUE = 6000  # MLflow cuts longer parameter values

Status = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri(config: TrackingConfig, output: Path) -> str:
    """The configured URI, or the sqlite file beside the output folder."""
    return config.uri or default_tracking_uri(output)


def read_metrics(output: Path) -> list[tuple[int, dict[str, float]]]:
    """Every recorded step with its metrics, in order; of a step trained again after a resume the last record."""
    steps: dict[int, dict[str, float]] = {}
    for line in (output / METRICS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {}).update(record["metrics"])
    return sorted(steps.items())


class Tracker:
    """Records of one run. Only rank 0 has one.

    Args:
        config, output: where the run is recorded.
        run_id: of the run to go on with; None starts a new one.
        params: flat settings.
        tags: what else describes the run.
        artifacts: name -> text, stored with the run.
        on_run_id: called from the shipping thread as soon as the run has an id.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output: Path,
        *,
        run_id: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        artifacts: Mapping[str, str],
        on_run_id: Callable[[str], None],
    ) -> None:
        self.run_id = run_id
        self.failure: str | None = None
        """Why the last attempt to reach MLflow failed; None when it worked."""
        self.uploading: Path | None = None
        """The folder that is being read for an upload; it should stay meanwhile."""
        self._folders: Sequence[Path] = ()
        self._config, self._output = config, output
        self._params, self._tags, self._artifacts = params, tags, artifacts
        self._on_run_id = on_run_id
        output.mkdir(parents=True, exist_ok=True)
        _remove_cut_record(output / METRICS)
        self._file = (output / METRICS).open("ab", buffering=0)
        self._unwritten = b""
        self._of_machine: dict[str, float] = {}
        self._status: Status | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._ship, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of an optimizer step, and the newest of the machine; returns at once."""
        record = {"step": step, "time": round(time.time(), 3), "metrics": {**metrics, **self._of_machine}}
        self._unwritten += json.dumps(record).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk must not end the run: the next record tries again
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def log_folders(self, folders: Sequence[Path]) -> None:
        """Stores those of these folders, files and all, that are not stored yet and still there when their turn comes.

        Returns at once. They replace what an earlier call named.
        """
        self._folders = list(folders)

    def close(self, status: Status) -> bool:
        """Ends the run, waiting at most `EXIT_WAIT_S` for the server, and for an upload as long as it goes on.

        Returns:
            False when something is left for the next start.
        """
        self._file.close()
        self._status = status
        self._wake.set()
        self._thread.join(EXIT_WAIT_S)
        while self._thread.is_alive() and self.uploading is not None:
            self._thread.join(1.0)
        return not self._thread.is_alive() and self.failure is None

    def _ship(self) -> None:
        shipper = _Shipper(self._config, self._output)
        opened = False
        while True:
            status = self._status
            try:
                if not opened:
                    self.run_id = shipper.open_run(self.run_id, self._params, self._tags, self._artifacts)
                    self._on_run_id(self.run_id)
                    opened = True
                self._of_machine = shipper.machine_metrics()
                shipper.send_new_records()
                if status is not None:
                    shipper.end_run(status)
                for folder in self._folders:
                    self.uploading = folder
                    shipper.send_folder(folder)
                self.failure = None
            except Exception as error:  # MLflow raises errors of many libraries, and none of them may stop a run
                reason = str(error).partition("\n")[0][:_LONGEST_REASON]
                self.failure = f"{type(error).__name__}: {reason}"
            self.uploading = None
            if status is not None:
                return
            self._wake.wait(SHIP_EVERY_S if self.failure is None else RETRY_EVERY_S)


def _remove_cut_record(path: Path) -> None:
    """Drops a last line without its end, which a killed process leaves."""
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def end_run(config: TrackingConfig, output: Path, run_id: str, status: Status) -> None:
    """Sets the status of a run whose own process cannot any more, and sends what it left behind."""
    shipper = _Shipper(config, output)
    shipper.attach(run_id)
    shipper.send_new_records()
    shipper.end_run(status)


def log_evaluation(
    config: TrackingConfig, output: Path, run_id: str, scores: Mapping[str, float], artifacts: Mapping[str, str]
) -> None:
    """Adds the scores of a trained model, and texts such as whole results, to its run. May raise what MLflow raises."""
    shipper = _Shipper(config, output)
    for name, value in scores.items():
        shipper.client.log_metric(run_id, name, value)
    for name, text in artifacts.items():
        shipper.client.log_text(run_id, text, name)


def reach(config: TrackingConfig) -> None:
    """Asks a tracking server, if there is one, for an experiment. Raises what MLflow raises when it does not get it."""
    if config.uri is not None and config.uri.startswith("http"):
        _Shipper(config, Path()).client.get_experiment("0")


def open_parent(config: TrackingConfig, output: Path, sweep: str, machine: str) -> str:
    """The run that MLflow shows others under; of one output folder always the same. May raise what MLflow raises.

    Args:
        sweep: the resolved sweep file.
        machine: that the trials run on, in words.
    """
    shipper, file = _Shipper(config, output), output / PARENT
    known = file.read_text(encoding="utf-8") if file.is_file() else None
    run_id = shipper.open_run(known, {}, {"pal.kind": "sweep", MACHINE_TAG: machine}, {SWEEP: sweep})
    atomic_write(file, run_id.encode())
    return run_id


def close_parent(config: TrackingConfig, output: Path, run_id: str, status: Status) -> None:
    """Sets the status of a parent run. May raise what MLflow raises."""
    shipper = _Shipper(config, output)
    shipper.attach(run_id)
    shipper.end_run(status)


class _Shipper:
    """Moves `metrics.jsonl` to MLflow, and knows how far it came. Every method may raise."""

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self._config, self._output = config, output
        self._uri = tracking_uri(config, output)
        self._run_id = ""
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            # Short, since a dead server otherwise holds one call for minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
        return self._client

    def open_run(
        self, run_id: str | None, params: Mapping[str, Any], tags: Mapping[str, str], artifacts: Mapping[str, str]
    ) -> str:
        from mlflow.entities import Param, RunTag

        if run_id is None:
            name = self._config.run_name or self._output.name
            run_id = self.client.create_run(self._experiment(), run_name=name).info.run_id
        else:
            self.client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        known = self.client.get_run(run_id).data.params  # MLflow refuses to change a parameter
        new = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in params.items() if key not in known]
        for first in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[first : first + 100])
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for name, text in artifacts.items():
            self.client.log_text(run_id, text, name)
        return run_id

    def attach(self, run_id: str) -> None:
        self._run_id = run_id

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self._config.experiment)
        if found is not None:
            return found.experiment_id
        # With a database file MLflow would put artifacts into ./mlruns of whoever started it.
        database = self._uri.removeprefix("sqlite:///")
        folder = (Path(database).absolute().parent / "mlartifacts").as_uri() if database != self._uri else None
        return self.client.create_experiment(self._config.experiment, artifact_location=folder)

    @functools.cached_property
    def _monitors(self) -> list[BaseMetricsMonitor]:
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

        monitors = [cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no GPU, or no library to ask it
            monitors.append(gpu_monitor.GPUMonitor())
        return monitors

    def machine_metrics(self) -> dict[str, float]:
        """What MLflow's monitors see of this machine (not of the other nodes), by the names that its UI groups."""
        found = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            found.update({f"system/{name}": value for name, value in monitor.aggregate_metrics().items()})
        return found

    def send_new_records(self) -> None:
        from mlflow.entities import Metric

        path = self._output / METRICS
        sent = self._read_state()["sent_bytes"]
        with path.open("rb") as file:
            file.seek(sent)
            while lines := [line for line in file.readlines(1 << 16) if line.endswith(b"\n")]:
                records = [json.loads(line) for line in lines]
                metrics = [
                    Metric(key, value, int(record["time"] * 1000), record["step"])
                    for record in records
                    for key, value in record["metrics"].items()
                    if math.isfinite(value)
                ]
                for first in range(0, len(metrics), _RECORDS_PER_CALL):
                    self.client.log_batch(self._run_id, metrics=metrics[first : first + _RECORDS_PER_CALL])
                sent += sum(map(len, lines))
                self._write_state(sent_bytes=sent)
                file.seek(sent)  # a line that is being written now is read again when it is whole

    def send_folder(self, folder: Path) -> None:
        sent = self._read_state()["sent_folders"]
        if folder.name not in sent and folder.is_dir():
            self.client.log_artifacts(self._run_id, str(folder), f"{FOLDERS}/{folder.name}")
            self._write_state(sent_folders=[*sent, folder.name])

    def end_run(self, status: Status) -> None:
        self.client.set_terminated(self._run_id, status)

    def _read_state(self) -> dict[str, Any]:
        path = self._output / STATE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sent_bytes": 0, "sent_folders": []}

    def _write_state(self, **changes: Any) -> None:
        atomic_write(self._output / STATE, json.dumps({**self._read_state(), **changes}).encode())
