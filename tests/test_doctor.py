"""`pal doctor`: one table names each problem and its host; the job runs under the launcher, on one and on two hosts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pipeline import doctor
from pipeline.config import ExperimentConfig, load_config
from pipeline.core.ranks import Ranks
from tests.helpers.hosts import hosts_named, needs_hosts
from tests.helpers.jobs import LIMIT_S, write_experiment

HOSTS = {"one": 2, "two": 2, "three": 2}
PLANTED = "planted-password-31415"


def node(**changes: Any) -> dict[str, Any]:
    healthy: dict[str, Any] = {
        "ranks": 2,
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "code": "abc",
        "gpus": ["A100 80 GiB"] * 2,
        "busy_gpus": [],
        "folder": "/shared",
        "disk_gib": 500.0,
        "disk_fault": None,
        "shared_memory_gib": 64.0,
        "features_fault": None,
        "tracker_fault": None,
        "clock_s": 1000.0,
        "sharing_fault": None,
        "all_reduce": {"mib": 256, "s": 0.01, "gb_s": 40.0},
    }
    return {**healthy, **changes}


def problems(**nodes: dict[str, Any]) -> list[tuple[str, str, str]]:
    checks = doctor.run_checks({"one": node(), "two": node(), "three": node(), **nodes}, HOSTS)
    return [(check, problem["host"], problem["fault"]) for check, _, rows in checks for problem in rows]


def test_healthy_nodes_have_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("changes", "check", "fault"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.13.0"}}, "torch", "has 2.13.0"),
        ({"versions": {"python": "3.11.7"}}, "torch", "has none"),
        ({"code": "def"}, "code", "has def"),
        ({"gpus": ["A100 80 GiB", "A100 40 GiB"]}, "GPUs", "has 1 x A100 80 GiB, 1 x A100 40 GiB"),
        ({"busy_gpus": [1]}, "ranks", "other processes use GPU 1"),
        ({"disk_gib": 3.0}, "disk", "has 3 GiB free, needs 20"),
        ({"shared_memory_gib": 0.1}, "/dev/shm", "has 0.1 GiB free, needs 1"),
        ({"disk_fault": "/shared is not writable"}, "writing", "/shared is not writable"),
        ({"features_fault": "no such bucket"}, "features", "no such bucket"),
        ({"tracker_fault": "refused"}, "tracker", "refused"),
        ({"clock_s": 1042.0}, "clocks", "is +42.0 s off"),
        ({"sharing_fault": "does not see it"}, "shared output", "does not see it"),
        ({"all_reduce_fault": "DistError: NCCL"}, "all-reduce", "DistError: NCCL"),
    ],
)
def test_a_fault_is_listed_once_with_its_host(changes: dict[str, Any], check: str, fault: str) -> None:
    assert problems(two=node(**changes)) == [(check, "two", fault)]


def test_a_node_with_fewer_gpus_than_ranks() -> None:
    assert ("ranks", "two", "has 1 GPUs for 2 ranks") in problems(two=node(gpus=["A100 80 GiB"]))


def test_nodes_that_do_not_answer_are_named_and_the_others_still_checked() -> None:
    assert problems(two={}, three=node(disk_gib=1.0)) == [
        ("answer", "two", "does not answer"),
        ("disk", "three", "has 1 GiB free, needs 20"),
    ]
    assert problems(one={}, two={}, three={}) == [("answer", host, "does not answer") for host in HOSTS]


def test_ranks_are_assigned_to_hosts_in_the_order_of_the_hostfile() -> None:
    nodes = doctor.merge_records([{"rank": 0, "a": 1}, {"rank": 3, "b": 2}, {"rank": 1, "c": 3}], {"x": 3, "y": 1})
    assert nodes == {"x": {"a": 1, "c": 3}, "y": {"b": 2}}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("experiment"))


class RefusingTracker(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_unreachable_services_are_reported_without_the_password(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PLANTED)
    server = HTTPServer(("127.0.0.1", 0), RefusingTracker)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_port}"
        config = load_config(ExperimentConfig, experiment, [f"tracking.uri={uri}", "data.validation=null"])
        state = doctor.inspect_node(config, Ranks(0, 1, 0, 1))
    finally:
        server.shutdown()
    assert "401" in state["tracker_fault"]
    assert state["features_fault"] is None
    assert PLANTED not in json.dumps(state)
    config = load_config(ExperimentConfig, experiment, [f"tracking.uri={uri}", "data.train=/nowhere"])
    server.server_close()
    state = doctor.inspect_node(config, Ranks(0, 1, 0, 1))
    assert "/nowhere" in state["features_fault"]
    assert state["tracker_fault"]


def _doctor(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.doctor", *map(str, arguments), "--json", str(folder / "doctor.json")],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_this_machine_under_the_launcher(experiment: Path, tmp_path: Path) -> None:
    done = _doctor(tmp_path, experiment, "--nproc", 2)
    figures = json.loads((tmp_path / "doctor.json").read_text())
    assert done.returncode == (1 if figures["problems"] else 0), done.stderr
    # The disk of the machine that runs the tests may be full.
    assert {problem["check"] for problem in figures["problems"]} <= {"disk", "/dev/shm"}
    assert figures["nodes"]["localhost"]["all_reduce"]["gb_s"] > 0
    assert "all-reduce" in done.stdout
    assert not list(experiment.parent.glob(".pal-doctor-*"))


SSH = """#!/bin/sh
# Replaces ssh: every host is this machine under another name, except one that does not answer.
while [ "${1#-}" != "$1" ]; do case "$1" in -[olp]) shift 2 ;; *) shift ;; esac; done
case "$1" in *silent*) echo "ssh: connect to host $1: timed out" >&2; exit 255 ;; esac
shift
[ "$*" = "hostname -I" ] && { echo 127.0.0.1; exit; }
exec env -i PATH="$PATH" HOME="$HOME" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 sh -c "$*"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
@pytest.mark.parametrize("second", ["reachable", "silent"])
def test_two_hosts_through_pdsh(experiment: Path, tmp_path: Path, second: str) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"first slots=1\n{second} slots=1\n")
    done = _doctor(
        tmp_path, experiment, "--hostfile", hostfile, "--timeout", 15, PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    figures = json.loads((tmp_path / "doctor.json").read_text())
    failed = {(problem["check"], problem["host"]) for problem in figures["problems"]}
    failed -= {(check, host) for check in ("disk", "/dev/shm") for host in ("first", second)}
    if second == "reachable":
        assert not failed, done.stdout + done.stderr
    else:
        assert ("answer", "silent") in failed, done.stdout + done.stderr
        assert done.returncode == 1


@pytest.mark.slow
@needs_hosts
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_two_hosts_and_a_cut_cable_between_them(experiment: Path, tmp_path: Path) -> None:
    names = ["worker-1", "worker-2"]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    with hosts_named(names, tmp_path / "hosts") as (_, second):
        arguments = (experiment, "--hostfile", hostfile, "--timeout", 60)
        path = f"{tmp_path / 'hosts'}:{os.environ['PATH']}"
        healthy = _doctor(tmp_path, *arguments, PATH=path)
        print(healthy.stdout, healthy.stderr)
        figures = json.loads((tmp_path / "doctor.json").read_text())
        assert {problem["check"] for problem in figures["problems"]} <= {"disk", "/dev/shm"}
        assert set(figures["nodes"]) == set(names) and all("all_reduce" in node for node in figures["nodes"].values())

        second.unplug()
        cut = _doctor(tmp_path, *arguments, PATH=path)
    print(cut.stdout, cut.stderr)
    problems = json.loads((tmp_path / "doctor.json").read_text())["problems"]
    failed = {(problem["check"], problem["host"]) for problem in problems}
    assert cut.returncode == 1 and ("all-reduce", "worker-2") in failed
    assert not [check for check, _ in failed if check == "answer"]
