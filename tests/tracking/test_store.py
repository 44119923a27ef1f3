"""Stores with unusual addresses, names and states: everything is recorded and found again, or the cause is named."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrackingConfig
from pipeline.core.errors import UserError
from pipeline.tracking import names, records, store, writer
from pipeline.tracking.reader import open_experiment, read_runs
from pipeline.tracking.shipper import STATE, Shipper
from pipeline.tracking.writer import METRICS, RunDescription, Tracker

CONFIG = TrackingConfig(experiment="e")


def record(output: Path, run_id: str | None = None, **description: Any) -> tuple[Tracker, list[str]]:
    """Records one step as a run of `output`; returns the closed tracker and the ids of its run."""
    ids: list[str] = []
    tracker = Tracker(CONFIG, output, run_id=run_id, description=RunDescription(**description), on_run_id=ids.append)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close("FINISHED")
    return tracker, ids


def client_of(output: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(writer.tracking_uri(CONFIG, output))


@pytest.mark.parametrize("name", ["a,b", "Q&A (speech)", "a//b", "../x", "x" * 300, "100 %", "a\n", "", "."])
def test_a_refused_name_becomes_one_that_mlflow_accepts(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    cleaned = names.clean(name)
    _validate_metric_name(cleaned)
    assert len(cleaned) <= 250 and cleaned != name
    assert names.restore({cleaned: 1}, names.originals([(cleaned, name)])) == {name: 1}


def test_names_stay_apart_and_accepted_ones_stay_as_they_are() -> None:
    assert len({names.clean(name) for name in ("a,b", "a;b", "a b", "a_b")}) == 4
    for name in ("train/loss", "中文", "accuracy_ünï", "train.seed"):
        assert names.clean(name) == name
    assert names.clean_path("evaluation/set.json") == "evaluation/set.json"
    assert names.clean_path("evaluation/a?b.json").endswith(".json")


@pytest.mark.parametrize("folder", ["100%20done", "what?x=1", "a#b", "my ünï runs"])
def test_runs_in_a_folder_with_any_name_are_found_again(tmp_path: Path, folder: str) -> None:
    output = tmp_path / folder / "one"
    scores = {f"evaluation/{name}.json": json.dumps({"accuracy": value}) for name, value in (("a,b", 1), ("a;b", 2))}
    tracker, _ = record(output, params={"a,b": 1, "a;b": 2}, artifacts=scores)
    assert tracker.failure is None
    assert (output.parent / "mlflow.db").is_file() and (output.parent / "mlartifacts").is_dir()
    (run,) = read_runs(*open_experiment("e", writer.tracking_uri(CONFIG, output)))
    assert run.params == {"a,b": "1", "a;b": "2"}
    assert run.evaluations == {"a,b": {"accuracy": 1}, "a;b": {"accuracy": 2}}


def test_scores_of_an_evaluation_are_found_under_their_own_names(tmp_path: Path) -> None:
    _, (run_id,) = record(tmp_path / "one")
    scores = {"eval/set/accuracy_Q&A": 0.5, "eval/set/accuracy_Q;A": 0.25}
    writer.log_evaluation(CONFIG, tmp_path / "one", run_id, scores, {"evaluation/set @ v2.json": "{}"})
    (run,) = read_runs(*open_experiment("e", writer.tracking_uri(CONFIG, tmp_path / "one")))
    assert {name: value for name, value in run.metrics.items() if name.startswith("eval")} == scores
    assert run.evaluations == {"set @ v2": {}}


def test_a_deleted_experiment_is_named_and_its_remedy_works(tmp_path: Path) -> None:
    record(tmp_path / "one")
    client = client_of(tmp_path / "one")
    experiment = client.get_experiment_by_name("e").experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match="is deleted"):
        writer.reach(CONFIG, tmp_path / "two")
    tracker, ids = record(tmp_path / "two")
    assert tracker.failure is not None and f"--experiment-id {experiment}" in tracker.failure and not ids
    client.restore_experiment(experiment)  # what the command of the message does
    tracker, ids = record(tmp_path / "two")
    assert tracker.failure is None and len(ids) == 1


def test_a_run_that_the_store_does_not_have_is_named(tmp_path: Path) -> None:
    record(tmp_path / "one")
    tracker, _ = record(tmp_path / "one", run_id="0" * 32)
    assert tracker.failure is not None and "run.json" in tracker.failure


def test_a_run_is_created_once_whatever_fails_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise OSError("the artifact store is away")

    monkeypatch.setattr(Shipper, "send_texts", away)
    monkeypatch.setattr(writer, "RETRY_EVERY_S", 0.05)
    ids: list[str] = []
    description = RunDescription(artifacts={"config.yaml": "a: 1\n"})
    tracker = Tracker(CONFIG, tmp_path / "one", run_id=None, description=description, on_run_id=ids.append)
    for step in range(20):
        tracker.log(step, {"train/loss": 1.0})
    assert not tracker.close("FINISHED")
    client = client_of(tmp_path / "one")
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert ids == [run.info.run_id] and run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 20


def test_a_run_whose_creation_was_not_answered_is_adopted(tmp_path: Path) -> None:
    lost = Shipper(CONFIG, tmp_path / "one")
    (tmp_path / "one").mkdir()
    lost_id = lost.open_run(None)  # the process is killed before it keeps the id
    _, ids = record(tmp_path / "one")
    assert ids == [lost_id]


def test_twelve_runs_that_start_at_once_share_a_new_database(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.tracking.test_store import record;"
        "tracker, ids = record(Path(sys.argv[1])); assert tracker.failure is None, tracker.failure"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}  # commands take the folder off the path
    processes = [subprocess.Popen([*command, str(tmp_path / f"run{number}")], env=environment) for number in range(12)]
    assert [process.wait(280) for process in processes] == [0] * 12
    runs = read_runs(*open_experiment("e", writer.tracking_uri(CONFIG, tmp_path / "run0")))
    assert sorted(run.name for run in runs) == sorted(f"run{number}" for number in range(12))
    assert all(run.losses == [(1, 1.0)] for run in runs)
    assert {file.name for file in tmp_path.glob("*.db*")} == {"mlflow.db", "mlflow.db.lock"}


def test_a_half_made_database_is_named_and_its_remedy_works(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    tracker, ids = record(tmp_path / "one")
    assert tracker.failure is not None and "half-made" in tracker.failure and "mv " in tracker.failure and not ids
    database.rename(tmp_path / "mlflow.db.broken")
    tracker, ids = record(tmp_path / "one")
    assert tracker.failure is None and len(ids) == 1
    assert len(client_of(tmp_path / "one").get_metric_history(ids[0], "train/loss")) == 2


def test_damaged_lines_are_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "one"
    output.mkdir()
    good = [json.dumps({"step": step, "time": 1.0, "metrics": {"train/loss": float(step)}}) for step in (1, 2)]
    (output / METRICS).write_bytes("\n".join([good[0], "\0\0\0", "5", '{"step": 3}', good[1], ""]).encode())
    with caplog.at_level("WARNING", "pal"):
        assert records.read_metrics(output) == [(1, {"train/loss": 1.0}), (2, {"train/loss": 2.0})]
    assert "skipped 3 damaged lines" in caplog.text
    tracker, ids = record(output)
    assert tracker.failure is None
    assert len(client_of(output).get_metric_history(ids[0], "train/loss")) == 3


def test_a_file_that_lost_its_end_is_sent_from_a_line_start(tmp_path: Path) -> None:
    output = tmp_path / "one"
    _, (run_id,) = record(output)
    (output / METRICS).write_bytes(b"")
    state = json.loads((output / STATE).read_text())
    (output / STATE).write_text(json.dumps({**state, "sent_bytes": 10}))
    tracker, _ = record(output, run_id=run_id)
    assert tracker.failure is None
    assert len(client_of(output).get_metric_history(run_id, "train/loss")) == 2


def test_what_the_disk_refused_is_in_the_final_figures_and_reported(tmp_path: Path) -> None:
    class Failing:
        def write(self, _: bytes) -> int:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            pass

    tracker = Tracker(CONFIG, tmp_path / "one", run_id=None, description=RunDescription(), on_run_id=lambda _: None)
    tracker.log(1, {"train/loss": 1.0})
    tracker._file.close()
    tracker._file = Failing()  # type: ignore[assignment]
    tracker.log(2, {"train/loss": 3.0})
    assert [metrics["train/loss"] for _, metrics in tracker.read_metrics()] == [1.0, 3.0]
    assert not tracker.close("FINISHED")
    assert tracker.failure is not None and "could not be written" in tracker.failure


def test_the_store_is_that_of_the_config_then_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "one"
    assert writer.tracking_uri(CONFIG, output) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert writer.tracking_uri(CONFIG, output) == "http://127.0.0.1:1"
    assert writer.tracking_uri(TrackingConfig(uri="http://127.0.0.1:2"), output) == "http://127.0.0.1:2"


def test_a_silent_or_absent_server_is_named_before_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_LIMIT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="does not answer"):
            open_experiment("e", uri)
    with pytest.raises(UserError, match="Connection refused"):
        open_experiment("e", uri)
