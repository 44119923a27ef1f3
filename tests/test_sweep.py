"""A sweep file defines trials that differ only in the keys it names; each is run once; mistakes are reported first."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.core.errors import UserError
from pipeline.experiments.trials import RESULT, SweepConfig
from pipeline.sweep import main, plan_trials
from tests.helpers.jobs import write_experiment

INTEGRATIONS = ["plits", "lal"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("experiment"))


def write_sweep(folder: Path, base: Path, **changes: Any) -> Path:
    values = {
        "name": "depth",
        "experiment": str(base),
        "output": str(folder / "sweep"),
        "cluster": "cpu",
        "grid": {"model.integration": INTEGRATIONS},
        "budget": {"steps": 2},
        **changes,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file


def planned(folder: Path, base: Path, **changes: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    return plan_trials(load_config(SweepConfig, write_sweep(folder, base, **changes)))


def test_every_combination_and_seed_is_a_trial(experiment: Path, tmp_path: Path) -> None:
    grid = {"model.integration": INTEGRATIONS, "train.learning_rate": [0.1, 0.01]}
    trials, rows = planned(tmp_path, experiment, grid=grid, seeds=[0, 7])
    settings = {(t.config.model.integration, t.config.train.learning_rate, t.config.train.seed) for t in trials}
    assert len(trials) == len(rows) == len(settings) == 8
    assert len({trial.output for trial in trials}) == 8
    assert {trial.config.train.steps for trial in trials} == {2}
    assert {row["audio_layers"][0] == [] for row in rows} == {True, False}


def test_a_budget_is_equal_for_all_trials(experiment: Path, tmp_path: Path) -> None:
    _, rows = planned(tmp_path, experiment, budget={"flops": 1e9})
    assert rows[0]["steps"] < rows[1]["steps"]  # a PLITS step needs more operations than a LAL step
    assert [row["flops"] for row in rows] == pytest.approx([1e9, 1e9], rel=0.2)
    _, rows = planned(tmp_path, experiment, budget={"tokens": 10_000})
    assert rows[0]["steps"] == rows[1]["steps"] > 2
    _, rows = planned(tmp_path, experiment, budget=None)
    assert {row["steps"] for row in rows} == {12}  # as in the base config


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"grid": {"model.integratoin": INTEGRATIONS}}, "did you mean 'integration'"),
        ({"grid": {}}, "grid: is empty"),
        ({"grid": {"model.integration": []}}, "grid.model.integration: is empty"),
        ({"grid": {"model.integration": ["lal", "lal"]}}, "repeats a value"),
        ({"seeds": [1, 1]}, "repeats a value"),
        ({"grid": {"train.seed": [0, 1]}}, "is set by seeds"),
        ({"grid": {"train.steps": [1, 2]}}, "is set by budget"),
        ({"runs": [{}]}, "exactly one of grid, runs, questions"),
        ({"grid": None}, "exactly one of grid, runs, questions"),
        ({"grid": None, "runs": []}, "runs: is empty"),
        ({"grid": None, "runs": [{}, {}]}, "runs: repeats a value"),
        ({"grid": None, "questions": [{"question": "?", "runs": [{}]}]}, "questions.0.runs"),
        ({"grid": None, "questions": [{"question": "?", "runs": [{}, {}]}]}, "questions.0.runs: repeats a value"),
        ({"budget": {"steps": 1, "tokens": 2}}, "exactly one of steps, tokens and flops"),
        ({"grid": {"data.questions_per_sequence": [5]}}, "are not divisible"),
        ({"grid": {"train.global_batch_size": [2**24], "train.micro_batch_size": [2**24]}}, "does not fit"),
        ({"experiment": "no_such_config"}, "no such config file"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    experiment: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(UserError, match=fault) as error:
        planned(tmp_path, experiment, **changes)
    assert "\n" not in str(error.value)


def test_the_shipped_sweeps_are_valid() -> None:
    sweep = load_config(SweepConfig, "demo_sweep")
    assert len(sweep.combinations()) == 3 and sweep.budget is not None
    questions = load_config(SweepConfig, "scaling").questions
    assert questions is not None and len(questions) == 10


def test_a_dry_run_prints_the_trials_and_runs_nothing(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    assert main([str(write_sweep(tmp_path, experiment)), "--dry-run", "--json", str(results)]) == 0
    assert [run["status"] for run in json.loads(results.read_text())["runs"]] == ["PLANNED"] * 2
    assert "integration=lal,seed=0" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()


def test_a_failed_trial_is_marked_and_finished_trials_are_not_run_again(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    held_out = experiment.parent / "held_out"
    broken = {"model.integration": "plits", "data.validation": str(tmp_path / "nowhere")}
    runs = [broken, {"model.integration": "lal"}]
    file = write_sweep(tmp_path, experiment, grid=None, runs=runs, evaluate=[str(held_out)])
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    assert main([str(file), "--json", str(first)]) == 1
    failed, finished = json.loads(first.read_text())["runs"]
    assert (failed["status"], finished["status"]) == ("FAILED", "FINISHED")
    assert finished["params"] == {"model.integration": "lal", "train.seed": 0}
    assert "final_loss" in finished["metrics"] and "eval/held_out/accuracy" in finished["metrics"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'sweep' / 'mlflow.db'}")
    child = client.get_run(finished["run_id"])
    assert client.get_run(child.data.tags["mlflow.parentRunId"]).data.tags["pal.kind"] == "sweep"

    (done,) = tmp_path.glob(f"sweep/*/{RESULT}")
    written = done.stat().st_mtime_ns
    shutil.rmtree(done.parent / "model")  # a second training would create it again
    assert main([str(file), "--json", str(again)]) == 1
    assert json.loads(again.read_text())["runs"][1] == finished
    assert done.stat().st_mtime_ns == written and not (done.parent / "model").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trials_survive_the_loss_of_a_cluster_node(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two nodes is killed while it trains: all trials finish, and none is trained twice."""
    import threading
    import time

    monkeypatch.setitem(os.environ, "RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from mlflow import MlflowClient
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    file = write_sweep(tmp_path, experiment, seeds=[0, 1, 2, 3, 4, 5])
    results = tmp_path / "results.json"

    def lose_a_node() -> None:
        while not list(tmp_path.glob(f"sweep/*/{RESULT}")):
            time.sleep(0.2)
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=lose_a_node, daemon=True)
    killer.start()
    try:
        assert main([str(file), "--ray", cluster.address, "--json", str(results)]) == 0
    finally:
        cluster.shutdown()
    killer.join(10)
    assert not killer.is_alive()
    runs = json.loads(results.read_text())["runs"]
    assert [run["status"] for run in runs] == ["FINISHED"] * 12
    client = MlflowClient(f"sqlite:///{tmp_path / 'sweep' / 'mlflow.db'}")
    experiment_id = client.get_experiment_by_name("depth").experiment_id
    children = [run for run in client.search_runs([experiment_id]) if "mlflow.parentRunId" in run.data.tags]
    assert sorted(run.info.run_id for run in children) == sorted(run["run_id"] for run in runs)
    assert all(run.data.metrics["final_loss"] for run in children)
