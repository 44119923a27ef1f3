"""Sends the records of an output folder to an MLflow run, and stores in the folder how much has been sent."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import TrackingConfig, default_tracking_uri
from pipeline.core.files import atomic_write

if TYPE_CHECKING:  # takes seconds to import
    from mlflow import MlflowClient
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

METRICS = "metrics.jsonl"  # file of an output folder: one record per line
STATE = "tracking.json"  # file of an output folder: how much of it MLflow has
FOLDERS = "checkpoints"  # artifact folder of a run: the folders of `Tracker.log_folders`
_METRICS_PER_CALL = 200
_PARAMETERS_PER_CALL = 100
_MAX_VALUE_LENGTH = 6000  # MLflow's limit for a parameter value

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class RunDescription:
    """What an MLflow run records beside its metrics.

    Attributes:
        params: settings, flat.
        tags: tags of the run.
        artifacts: name -> text.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)


def tracking_uri(config: TrackingConfig, output: Path) -> str:
    """Returns the configured URI, or that of the sqlite file beside the output folder."""
    return config.uri or default_tracking_uri(output)


class Shipper:
    """Sends records and folders to one MLflow run. Every method may raise what MLflow raises."""

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self._config, self._output = config, output
        self._uri = tracking_uri(config, output)
        self._run_id = ""
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, created at first use."""
        if self._client is None:
            # Short limits, since with the defaults one call to a dead server takes minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
        return self._client

    def open_run(self, run_id: str | None, description: RunDescription) -> str:
        """Starts or resumes a run and records its description; returns the run's id."""
        from mlflow.entities import Param, RunTag

        if run_id is None:
            name = self._config.run_name or self._output.name
            run_id = self.client.create_run(self._experiment(), run_name=name).info.run_id
        else:
            self.client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        known = self.client.get_run(run_id).data.params  # MLflow refuses to change a parameter
        new = [
            Param(key, str(value)[:_MAX_VALUE_LENGTH]) for key, value in description.params.items() if key not in known
        ]
        for first in range(0, len(new), _PARAMETERS_PER_CALL):
            self.client.log_batch(run_id, params=new[first : first + _PARAMETERS_PER_CALL])
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in description.tags.items()])
        for name, text in description.artifacts.items():
            self.client.log_text(run_id, text, name)
        return run_id

    def attach(self, run_id: str) -> None:
        """Continues with an existing run without changing it."""
        self._run_id = run_id

    def _experiment(self) -> str:
        experiment = self.client.get_experiment_by_name(self._config.experiment)
        if experiment is not None:
            return experiment.experiment_id
        # With a database file, MLflow would put artifacts into ./mlruns of the current directory.
        database = self._uri.removeprefix("sqlite:///")
        folder = (Path(database).absolute().parent / "mlartifacts").as_uri() if database != self._uri else None
        return self.client.create_experiment(self._config.experiment, artifact_location=folder)

    @functools.cached_property
    def _monitors(self) -> list[BaseMetricsMonitor]:
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

        monitors = [cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no GPU, or no library to query it
            monitors.append(gpu_monitor.GPUMonitor())
        return monitors

    def machine_metrics(self) -> dict[str, float]:
        """Returns the metrics of MLflow's monitors for this machine (not for other nodes), named as its UI groups
        them."""
        metrics = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            metrics.update({f"system/{name}": value for name, value in monitor.aggregate_metrics().items()})
        return metrics

    def send_new_records(self) -> None:
        """Sends the records that were appended to `metrics.jsonl` since the last call."""
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
                for first in range(0, len(metrics), _METRICS_PER_CALL):
                    self.client.log_batch(self._run_id, metrics=metrics[first : first + _METRICS_PER_CALL])
                sent += sum(map(len, lines))
                self._write_state(sent_bytes=sent)
                file.seek(sent)  # a line that is still being written is read again once it is complete

    def send_folder(self, folder: Path) -> None:
        """Stores a folder with the run, unless it is stored already or has been removed."""
        sent = self._read_state()["sent_folders"]
        if folder.name not in sent and folder.is_dir():
            self.client.log_artifacts(self._run_id, str(folder), f"{FOLDERS}/{folder.name}")
            self._write_state(sent_folders=[*sent, folder.name])

    def end_run(self, status: Status) -> None:
        """Sets the final status of the run."""
        self.client.set_terminated(self._run_id, status)

    def _read_state(self) -> dict[str, Any]:
        path = self._output / STATE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sent_bytes": 0, "sent_folders": []}

    def _write_state(self, **changes: Any) -> None:
        atomic_write(self._output / STATE, json.dumps({**self._read_state(), **changes}).encode())
