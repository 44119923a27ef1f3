"""Reads the runs of an MLflow experiment as plain values, and logs a report of them back to it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import read_yaml
from pipeline.core.errors import UserError, nearest
from pipeline.tracking import names, store
from pipeline.tracking.writer import CORRECTNESS, EVALUATIONS, SWEEP

if TYPE_CHECKING:  # takes seconds to import, which `--help` must not
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


KIND_TAG = "pal.kind"
NOT_TRAINED = ("sweep", "report")  # kinds of runs that only hold results of other runs
LOSS = "train/loss"


@dataclass(frozen=True)
class TrainedRun:
    """One training run as MLflow recorded it.

    Attributes:
        label: name of the run, with its id if other runs have the same name.
        started: start time, in seconds since 1970.
        losses: (optimizer step, training loss) pairs.
        evaluations: benchmark -> scores of `pal evaluate`.
    """

    name: str
    label: str
    started: float
    tags: Mapping[str, str]
    run_id: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    losses: Sequence[tuple[int, float]]
    evaluations: Mapping[str, Any]

    @property
    def curve_label(self) -> str:
        """The label, with how and where a run ended that did not finish."""
        outcome = {"KILLED": "stopped", "FAILED": "failed", "RUNNING": "running", "SCHEDULED": "running"}.get(
            self.status
        )
        if outcome is None or not self.losses:
            return self.label
        return f"{self.label} ({outcome} after step {self.losses[-1][0]})"

    @property
    def scored(self) -> dict[str, Any]:
        """Returns the evaluations with scores; where a benchmark's publishers withhold all answers there are none."""
        return {benchmark: scores for benchmark, scores in self.evaluations.items() if "accuracy" in scores}


def open_experiment(name: str, uri: str | None) -> tuple[MlflowClient, Experiment]:
    """Opens an experiment by its name.

    Args:
        uri: URI of the tracking store; None means MLFLOW_TRACKING_URI, or `runs/mlflow.db`.

    Raises:
        UserError: the store cannot be read, or has no such experiment.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    database = store.database_path(uri)
    if database is not None and not database.is_file():
        remedy = "set --uri or MLFLOW_TRACKING_URI to the store of the runs; `pal train` writes mlflow.db beside the "
        remedy += "output folder, so runs in runs/NAME are in sqlite:///runs/mlflow.db"
        raise UserError(uri, "there is no such MLflow database", remedy)
    store.require_answer(uri)
    try:
        client = store.open_client(uri)
        experiment = client.get_experiment_by_name(name)
        choices = [other.name for other in client.search_experiments()] if experiment is None else []
    except UserError:
        raise
    except Exception as error:  # MLflow raises errors of many libraries
        raise UserError(
            "--uri", store.describe_fault(error, uri), "check the address and that the server runs"
        ) from error
    if experiment is None:
        raise UserError(f"experiment '{name}'", f"is not in {uri}", nearest(name, choices))
    return client, experiment


def read_runs(client: MlflowClient, experiment: Experiment) -> list[TrainedRun]:
    """Returns every training run of the experiment, oldest first.

    Raises:
        UserError: the experiment has no training run.
    """
    runs: list[Run] = []
    token = None
    while token is None or token:
        page = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        runs += [run for run in page if run.data.tags.get(KIND_TAG) not in NOT_TRAINED]
        token = page.token or ""
    if not runs:
        raise UserError(f"experiment '{experiment.name}'", "has no runs", "train one with `pal train`")
    labels = [run.info.run_name for run in runs]
    return [
        TrainedRun(
            name=name,
            started=run.info.start_time / 1000,
            tags=run.data.tags,
            label=name if labels.count(name) == 1 else f"{name} ({run.info.run_id[:6]})",
            run_id=run.info.run_id,
            status=run.info.status,
            params=names.restore(run.data.params, run.data.tags),
            metrics=names.restore(run.data.metrics, run.data.tags),
            losses=_loss_history(client, run),
            evaluations=_evaluations(client, run),
        )
        for name, run in zip(labels, runs, strict=True)
    ]


def _loss_history(client: MlflowClient, run: Run) -> list[tuple[int, float]]:
    if LOSS not in run.data.metrics:
        return []
    # A step that is repeated after a resume is logged again; the last entry counts.
    history = sorted(client.get_metric_history(run.info.run_id, LOSS), key=lambda metric: metric.timestamp)
    return sorted({metric.step: metric.value for metric in history}.items())


def _evaluations(client: MlflowClient, run: Run) -> dict[str, Any]:
    evaluations = {}
    with tempfile.TemporaryDirectory() as folder:
        for artifact in client.list_artifacts(run.info.run_id, EVALUATIONS):
            if artifact.path.endswith(".json"):
                file = Path(client.download_artifacts(run.info.run_id, artifact.path, folder))
                original = run.data.tags.get(names.ORIGINAL + artifact.path, artifact.path)
                benchmark = original.removeprefix(f"{EVALUATIONS}/").removesuffix(".json")
                evaluations[benchmark] = json.loads(file.read_text(encoding="utf-8"))
    return evaluations


def read_sweep(client: MlflowClient, experiment: Experiment) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Returns the resolved config of the sweep whose trials the experiment holds, and the tags of the sweep's run.

    Raises:
        UserError: the experiment holds no sweep.
    """
    sweeps = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = 'sweep'", max_results=1)
    if not sweeps:
        raise UserError(f"experiment '{experiment.name}'", "holds no sweep", "run one with `pal sweep`")
    with tempfile.TemporaryDirectory() as folder:
        file = client.download_artifacts(sweeps[0].info.run_id, SWEEP, folder)
        return read_yaml(Path(file)), sweeps[0].data.tags


def read_correctness(client: MlflowClient, run: TrainedRun, benchmark: str) -> dict[str, list[Any]]:
    """Returns which questions of a benchmark a run answered correctly: columns `question_id`, `clip_id`, `correct`."""
    with tempfile.TemporaryDirectory() as folder:
        path = names.clean_path(f"{CORRECTNESS}/{benchmark}.json")
        file = client.download_artifacts(run.run_id, path, folder)
        correctness: dict[str, list[Any]] = json.loads(Path(file).read_text(encoding="utf-8"))
        return correctness


def log_back(client: MlflowClient, experiment: Experiment, files: Sequence[Path]) -> None:
    """Stores a report in the experiment, replacing the previous one.

    It is stored in the run of the sweep if the runs are its trials, otherwise in a run of its own.
    """
    for kind in NOT_TRAINED:
        targets = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = '{kind}'", max_results=1)
        if targets:
            break
    else:
        targets = [client.create_run(experiment.experiment_id, tags={KIND_TAG: "report"}, run_name="report")]
        client.set_terminated(targets[0].info.run_id)
    for file in files:
        client.log_artifact(targets[0].info.run_id, str(file), "report")
