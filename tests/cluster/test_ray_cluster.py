"""Preparation, training and a sweep as jobs of a Ray cluster of two nodes, submitted from outside: results are the same
as without Ray, even if a node is lost or a job is stopped, and no secret of a node is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.loading import dump_config
from pipeline.core.errors import EXIT_STOPPED
from pipeline.launch import rank_process
from pipeline.tracking.writer import METRICS, read_metrics
from tests.helpers.corpora import hashes, prepare_config, prepare_here, write_corpus
from tests.helpers.jobs import start_job, write_experiment
from tests.helpers.ray_clusters import TOKEN, RayCluster, pal_submit, start_submit

SECRET = "planted-secret-of-the-nodes-2718"
VARIABLE = "a-variable-that-is-no-secret-1618"
LIMIT_S = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster(MLFLOW_TRACKING_PASSWORD=SECRET, HF_TOKEN=SECRET)
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the file system of all nodes; `pal submit` sends its subfolder `sent`."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "sent").mkdir()
    return folder


def submitted(cluster: RayCluster, folder: Path, *command: object, options: tuple[str, ...] = ()) -> Any:
    """Starts `pal submit` with a command."""
    sent = f"working_dir={folder / 'sent'}"
    return start_submit(cluster.job_server, sent, *options, "--", "pal", *command, PLACE=VARIABLE)


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=30)
        time.sleep(0.02)


def curve(output: Path) -> list[tuple[int, float, float]]:
    if not (output / METRICS).exists():
        return []
    return [(step, metrics["train/loss"], metrics["train/gradient_norm"]) for step, metrics in read_metrics(output)]


def test_features_are_the_same_although_a_node_was_lost(cluster: RayCluster, folder: Path) -> None:
    manifest = write_corpus(folder / "corpus", 240, 5.0)
    settings: dict[str, Any] = {"partition_clips": 4, "workers": {"max": 2}}
    prepare_here(prepare_config(manifest, folder / "local", **settings))
    config = folder / "prepare.yaml"
    config.write_text(dump_config(prepare_config(manifest, folder / "features", **settings)))

    def committed() -> int:
        return len(list((folder / "features").glob("**/commits/*.json")))

    job = submitted(cluster, folder, "prepare", config)
    wait_until(lambda: committed() > 2, job)
    killed = cluster.kill(cluster.nodes[-1])
    at_the_loss = committed()
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, err + out
    assert at_the_loss < 60 and killed
    assert '"written": 240' in out
    assert hashes(folder / "features") == hashes(folder / "local")
    cluster.wait_until_known()
    cluster.add_node()


@pytest.fixture(scope="module")
def experiment(folder: Path) -> Path:
    return write_experiment(folder / "experiment")


def test_losses_are_the_same_although_a_node_was_lost_and_the_job_was_stopped(
    cluster: RayCluster, folder: Path, experiment: Path
) -> None:
    local_output, remote_output = folder / "local_run", folder / "remote_run"
    local = start_job(experiment, "--nproc", 2, f"output={local_output}")
    assert local.wait(LIMIT_S) == 0

    train = ("train", experiment, f"output={remote_output}", "--ray", "auto", "--nproc", 2, "--max-restarts", 1)
    job = submitted(cluster, folder, *train, options=("--stop-on-interrupt",))
    wait_until(lambda: len(curve(remote_output)) > 4, job)

    def ranks() -> dict[str, int]:
        files = (remote_output / rank_process.RANKS).glob("*.json")
        return {path.stem.replace("-", " "): json.loads(path.read_text())["pid"] for path in files}

    pids = ranks()
    killed = cluster.lose(cluster.nodes[-1])
    (lost,) = [rank for rank, pid in pids.items() if pid in killed]
    cluster.add_node()
    wait_until(lambda: ranks().keys() == pids.keys() and not set(ranks().values()) & set(pids.values()), job)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == EXIT_STOPPED, err + out
    assert f"{lost} failed: Ray has lost it on node" in out and "restart 1 of 1" in out and "resumed from" in out
    assert "checkpoint saved; rerun the same command to resume" in out

    done = submitted(cluster, folder, *train)
    out, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, err + out
    assert "resumed from" in out and re.search(r"step +12/12 ", out)
    assert curve(remote_output) == curve(local_output) and len(curve(local_output)) == 12
    weights = "model/model.safetensors"
    assert (remote_output / weights).read_bytes() == (local_output / weights).read_bytes()


def test_a_sweep_gives_the_same_results_as_without_ray(cluster: RayCluster, folder: Path, experiment: Path) -> None:
    figures = {}
    for place in ("local", "remote"):
        file = folder / f"{place}.yaml"
        settings = {"grid": {"model.integration": ["lal"]}, "budget": {"steps": 2}, "cluster": "cpu"}
        values = {"name": place, "experiment": str(experiment), "output": str(folder / f"sweep-{place}"), **settings}
        file.write_text(yaml.safe_dump(values))
        results = folder / f"{place}.json"
        if place == "local":
            command = [sys.executable, "-m", "pipeline.sweep", str(file), "--json", str(results)]
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            assert subprocess.run(command, env=environment, timeout=LIMIT_S).returncode == 0
        else:
            done = submitted(cluster, folder, "sweep", file, "--ray", "auto", "--json", results)
            out, err = done.communicate(timeout=LIMIT_S)
            assert done.returncode == 0 and "1/1 trials" in out, err + out
        runs = json.loads(results.read_text())["runs"]
        figures[place] = [(run["params"], run["status"], run["metrics"]["final_loss"]) for run in runs]
    assert figures["remote"] == figures["local"] and {status for _, status, _ in figures["local"]} == {"FINISHED"}


def test_no_secret_is_left_behind(cluster: RayCluster, folder: Path) -> None:
    """Ray writes the variables of a job to logs, so `pal submit` sends no secret among them."""
    job = pal_submit(
        cluster.job_server, f"working_dir={folder / 'sent'}", "environment=[PLACE]", "--", "sh", "-c", "exit 4",
        PLACE=VARIABLE, HF_TOKEN=SECRET,
    )  # fmt: skip
    assert job.returncode == 4
    time.sleep(5)  # until Ray has cleaned up after the job and logged it
    logged = {secret: _files_with(secret, cluster.folder) for secret in (VARIABLE, SECRET, TOKEN)}
    assert any(path.name == "runtime_env_agent.log" for path in logged[VARIABLE]), logged
    assert not logged[SECRET] and not logged[TOKEN], logged
    assert not _files_with(SECRET, folder)  # configs, logs of the launcher, metrics
    for database in folder.glob("**/mlflow.db"):
        with sqlite3.connect(database) as store:
            assert SECRET not in "\n".join(store.iterdump())


def _files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.glob("**/*") if path.is_file() and text.encode() in path.read_bytes()]
