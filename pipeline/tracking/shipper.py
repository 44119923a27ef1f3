"""Sends the records of an output folder to an MLflow run, and stores in the folder how much has been sent."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pipeline.config import TrackingConfig
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write
from pipeline.tracking import names, records, store
from pipeline.tracking.records import METRICS

if TYPE_CHECKING:  # takes seconds to import
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

STATE = "tracking.json"  # file of an output folder: how much of it MLflow has
FOLDERS = "checkpoints"  # artifact folder of a run: the folders of `Tracker.log_folders`
_METRICS_PER_CALL = 200
_PARAMETERS_PER_CALL = 100
_MAX_VALUE_LENGTH = 6000  # MLflow's limit for a parameter value
_MAX_TAG_LENGTH = 5000  # MLflow's limit for a tag value
CREATION_TAG = "pal.creation"  # marks the run that an output folder has created

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


class Shipper:
    """Sends records and folders to one MLflow run. Every method may raise what MLflow raises."""

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self._config, self._output = config, output
        self.uri = store.tracking_uri(config, output)
        self._run_id = ""
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, created at first use."""
        if self._client is None:
            self._client = store.open_client(self.uri)
        return self._client

    def open_run(self, run_id: str | None) -> str:
        """Starts or resumes a run; returns its id.

        A run is created once, even if the answer of the server to the first attempt was lost: a tag marks it.

        Raises:
            UserError: the experiment or the run is deleted or unknown, or MLflow refuses a name.
        """
        if run_id is None:
            run_id = self._created_before() or self._create()
        else:
            self._require_run(run_id)
            self.client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        return run_id

    def _create(self) -> str:
        name = self._config.run_name or self._output.name
        experiment = store.open_experiment(self.client, self._config.experiment, self.uri)
        mark = uuid.uuid4().hex
        self._write_state(creation=mark)
        return str(self.client.create_run(experiment, run_name=name, tags={CREATION_TAG: mark}).info.run_id)

    def _created_before(self) -> str | None:
        mark = self._read_state().get("creation")
        if mark is None:
            return None
        experiment = store.open_experiment(self.client, self._config.experiment, self.uri)
        runs = self.client.search_runs([experiment], f"tags.`{CREATION_TAG}` = '{mark}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _require_run(self, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            remedy = "set tracking.uri or MLFLOW_TRACKING_URI to the store that has it, or record it as a new run: set "
            remedy += f"run_id to null in {self._output / 'run.json'} and remove {self._output / STATE}"
            raise UserError(f"run {run_id}", f"is not in {self.uri}", remedy) from error
        if info.lifecycle_stage != "active":
            command = f"MLFLOW_TRACKING_URI='{self.uri}' mlflow runs restore --run-id {run_id}"
            raise UserError(f"run {run_id}", f"is deleted in {self.uri}", f"restore it (`{command}`)")
        experiment = self.client.get_experiment(info.experiment_id)
        store.require_active(experiment.lifecycle_stage, experiment.name, info.experiment_id, self.uri)

    def describe(self, description: RunDescription) -> None:
        """Records parameters and tags of the run."""
        from mlflow.entities import Param

        known = self.client.get_run(self._run_id).data.params  # MLflow refuses to change a parameter
        params = {names.clean(key): (key, value) for key, value in description.params.items()}
        new = [Param(key, str(value)[:_MAX_VALUE_LENGTH]) for key, (_, value) in params.items() if key not in known]
        for first in range(0, len(new), _PARAMETERS_PER_CALL):
            self.client.log_batch(self._run_id, params=new[first : first + _PARAMETERS_PER_CALL])
        tags = {names.clean(key): (key, value) for key, value in description.tags.items()}
        pairs = [(name, original) for entries in (params, tags) for name, (original, _) in entries.items()]
        values = {name: value for name, (_, value) in tags.items()} | names.originals(pairs)
        self._tag(values)

    def _tag(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value[:_MAX_TAG_LENGTH]) for key, value in values.items()]
        for first in range(0, len(tags), _PARAMETERS_PER_CALL):
            self.client.log_batch(self._run_id, tags=tags[first : first + _PARAMETERS_PER_CALL])

    def send_texts(self, texts: Mapping[str, str]) -> None:
        """Stores texts as artifacts of the run: path -> text."""
        paths = {path: names.clean_path(path) for path in texts}
        for path, text in texts.items():
            self.client.log_text(self._run_id, text, paths[path])
        self._tag(names.originals((name, path) for path, name in paths.items()))

    def send_scores(self, scores: Mapping[str, float]) -> None:
        """Records metrics that belong to no step."""
        from mlflow.entities import Metric

        keys = {key: names.clean(key) for key in scores}
        now = int(time.time() * 1000)
        metrics = [Metric(keys[key], value, now, 0) for key, value in scores.items() if math.isfinite(value)]
        self._send_metrics(metrics)
        self._tag(names.originals((name, key) for key, name in keys.items()))

    def _send_metrics(self, metrics: Sequence[Metric]) -> None:
        for first in range(0, len(metrics), _METRICS_PER_CALL):
            self.client.log_batch(self._run_id, metrics=metrics[first : first + _METRICS_PER_CALL])

    def attach(self, run_id: str) -> None:
        """Continues with an existing run without changing it."""
        self._run_id = run_id

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
            sent = _line_start(file, sent)
            file.seek(sent)
            while lines := [line for line in file.readlines(1 << 16) if line.endswith(b"\n")]:
                values = [
                    (key, Metric(names.clean(key), value, int(record["time"] * 1000), record["step"]))
                    for record in records.parse(lines, path)
                    for key, value in record["metrics"].items()
                    if math.isfinite(value)
                ]
                self._send_metrics([metric for _, metric in values])
                renamed = {metric.key: key for key, metric in values if metric.key != key}
                self._tag(names.originals(renamed.items()))
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
        state = {"sent_bytes": 0, "sent_folders": []}
        path = self._output / STATE
        with contextlib.suppress(OSError, ValueError):  # without the state everything is sent again, which adds nothing
            state |= json.loads(path.read_text(encoding="utf-8"))
        return state

    def _write_state(self, **changes: Any) -> None:
        atomic_write(self._output / STATE, json.dumps({**self._read_state(), **changes}).encode())


def _line_start(file: BinaryIO, position: int) -> int:
    """Returns the position, or the start of the line that it is in: a crash may have shortened the file since."""
    position = min(position, file.seek(0, os.SEEK_END))
    file.seek(0)
    return file.read(position).rfind(b"\n") + 1
