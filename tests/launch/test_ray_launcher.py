"""Ranks on a real Ray cluster of two nodes: their placement and environment, stop requests, and the loss of a node."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, UserError
from pipeline.core.ranks import free_port
from pipeline.launch import ray_launcher, supervisor
from pipeline.launch.ray_launcher import RankLocation
from tests.helpers.ray_clusters import RayCluster

SECRET = "planted-secret-of-the-driver-1414"
RANK = """
import json, os, sys, time
from pathlib import Path
from pipeline.launch import rank_process

what, output = sys.argv[1], Path(sys.argv[2])
rank_process.register_rank(output, int(os.environ["RANK"]))
rank_process.print_to_parent(json.dumps({**os.environ, "cwd": os.getcwd(), "pid": os.getpid()}))
stop = []
rank_process.watch_parent(lambda: stop.append(True))
while what == "wait" and not stop:
    time.sleep(0.05)
if stop:
    raise SystemExit(rank_process.record_exit(output, int(os.environ["RANK"]), 7, 75, "stopped at step 7"))
raise SystemExit(3 if what == "fail" and os.environ["RANK"] == "1" else 0)
"""


def test_ranks_of_a_node_are_adjacent_and_see_all_its_gpus() -> None:
    locations = [
        RankLocation("10.0.0.1", "a", ("2",), 5000),
        RankLocation("10.0.0.1", "a", ("5",), 5001),
        RankLocation("10.0.0.2", "b", ("0",), 1),
    ]
    environments = ray_launcher.rank_environments(locations)
    keys = ("RANK", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    assert [tuple(environment[key] for key in keys) for environment in environments] == [
        ("0", "0", "0", "2", "2,5"),
        ("1", "0", "1", "2", "2,5"),
        ("2", "1", "0", "1", "0"),
    ]
    for environment in environments:
        group = (environment["WORLD_SIZE"], environment["MASTER_ADDR"], environment["MASTER_PORT"])
        assert group == ("3", "10.0.0.1", "5000")
    (without_gpus,) = ray_launcher.rank_environments([RankLocation("10.0.0.1", "a", (), 1)])
    assert "CUDA_VISIBLE_DEVICES" not in without_gpus


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.close()


class Job:
    """Two ranks of the script above under `supervisor.supervise`; `reports` holds the environment of each."""

    def __init__(self, cluster: RayCluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "a_rank.py").write_text(RANK)
        monkeypatch.chdir(folder)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, cluster.environment[name])
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        self._address, self._output = cluster.address, folder / "output"
        self.reports: list[dict[str, Any]] = []

    def run(self, what: str) -> tuple[int, str]:
        return supervisor.supervise(
            [what, str(self._output)],
            self._output,
            supervisor.Placement(2, on_gpu=False, ray_address=self._address),
            module="a_rank",
            on_line=lambda line: self.reports.append(json.loads(line)),
        )

    def when_started(self, act: Callable[[], None]) -> None:
        def wait_and_act() -> None:
            while len(self.reports) < 2:
                time.sleep(0.05)
            act()

        threading.Thread(target=wait_and_act, daemon=True).start()


def test_each_node_runs_a_rank_and_its_exit_code_is_returned(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(cluster, tmp_path, monkeypatch)
    code, message = job.run("fail")
    assert code == EXIT_FAILURE and message.startswith("rank 0, 1 exited or hung without an error message"), message
    first, second = sorted(job.reports, key=lambda environment: environment["RANK"])
    assert [first[key] for key in ("RANK", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "0", "0", "1"]
    assert [second[key] for key in ("RANK", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["1", "1", "0", "1"]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    for environment in (first, second):
        assert environment["cwd"] == str(tmp_path)
        assert environment["DS_ACCELERATOR"] == "cpu" and environment["OMP_NUM_THREADS"] == "1"
        assert SECRET not in json.dumps(environment), "nodes have their own secrets"


@pytest.mark.slow
def test_a_signal_stops_ranks_as_under_the_deepspeed_launcher(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(cluster, tmp_path, monkeypatch)

    def stop() -> None:
        """Signals every process of the job, as Ray does to stop it, the ranks' launcher first."""
        for process in psutil.Process().children():
            if "pipeline.launch.ray_launcher" in process.cmdline():
                process.terminate()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    job.when_started(stop)
    assert job.run("wait") == (EXIT_STOPPED, "stopped at step 7")


@pytest.mark.slow
def test_a_lost_node_is_named_and_the_next_job_waits_for_another(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(cluster, tmp_path, monkeypatch)
    killed: set[int] = set()
    job.when_started(lambda: killed.update(cluster.lose(cluster.nodes[-1])))
    code, message = job.run("wait")
    (rank,) = [environment["RANK"] for environment in job.reports if environment["pid"] in killed]
    assert code == EXIT_FAILURE and message.startswith(f"rank {rank} failed: Ray has lost it on node"), message
    cluster.add_node()
    assert job.run("end") == (0, "")


def test_user_errors_are_raised_before_anything_starts() -> None:
    with pytest.raises(UserError, match="--nproc: 0 is below 1"):
        ray_launcher.devices("auto", 0)
    with pytest.raises(UserError, match="--ray: no cluster answers at"):
        ray_launcher.devices(f"127.0.0.1:{free_port()}", 1)
