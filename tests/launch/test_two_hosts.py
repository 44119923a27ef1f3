"""Two hosts train like two ranks on one host; the job ends in order when the hosts lose each other or it is stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED
from pipeline.core.ranks import free_port
from pipeline.tracking.writer import read_metrics
from tests.helpers.hosts import Host, hosts_named, needs_hosts
from tests.helpers.jobs import LIMIT_S, end_of, start_job, wait_for_step, write_experiment


@pytest.mark.slow
def test_a_launcher_on_each_host_gives_the_losses_of_one_host(tmp_path: Path) -> None:
    experiment = write_experiment(tmp_path, steps=4)
    assert end_of(start_job(experiment, "--nproc", 2, f"output={tmp_path / 'one'}"), tmp_path / "one")[0] == 0

    hostfile = tmp_path / "hostfile"
    hostfile.write_text("host-a slots=1\nhost-b slots=1\n")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh", "--hostfile", str(hostfile)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    hosts = [
        subprocess.Popen(
            [
                *command,
                "--node_rank",
                str(rank),
                "--module",
                "pipeline.train",
                experiment,
                f"output={tmp_path / 'two'}",
            ],
            env={**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [host.communicate(timeout=LIMIT_S)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(text[-3000:] for text in logs)

    one, two = ([metrics["train/loss"] for _, metrics in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 4
    assert two == one


NAMES = ["worker-1", "worker-2"]
STEPS = 40
COLLECTIVE_TIMEOUT_S = 15
needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")


def launcher_on(host: Host, node_rank: int, config: Path, output: Path) -> subprocess.Popen[str]:
    """Starts a launcher on one host, as is done on every host where there is no ssh."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh", "--node_rank", node_rank]
    words += ["--hostfile", config.parent / "hostfile", "--master_addr", NAMES[0]]
    words += ["--module", "pipeline.train", config, f"output={output}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(host.command(*words), env=environment, stdout=PIPE, stderr=PIPE, text=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_hosts")
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    return write_experiment(
        folder, checkpoint={"every_steps": 2, "keep": 2}, steps=STEPS, collective_timeout_s=COLLECTIVE_TIMEOUT_S
    )


@pytest.fixture(scope="module")
def expected(config: Path) -> list[float]:
    """Losses of an undisturbed run on one host."""
    output = config.parent / "undisturbed"
    code, _, err = end_of(start_job(config, "--nproc", 2, f"output={output}"), output)
    assert code == 0, err
    return losses(output)


def losses(output: Path) -> list[float]:
    return [metrics["train/loss"] for _, metrics in read_metrics(output)]


@contextlib.contextmanager
def two_hosts(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    """Starts both hosts, and puts an ssh that reaches them on the PATH."""
    folder = config.parent / "hosts"
    with monkeypatch.context() as changes, hosts_named(NAMES, folder) as hosts:
        changes.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield hosts


def start_on_hosts(config: Path, output: Path) -> subprocess.Popen[str]:
    return start_job(config, "--hostfile", config.parent / "hostfile", f"output={output}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_hosts
@needs_pdsh
def test_a_cut_cable_is_reported_with_both_hosts_and_the_run_resumes(
    config: Path, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = config.parent / "cut"
    with two_hosts(config, monkeypatch) as (_, second):
        job = start_on_hosts(config, output)
        wait_for_step(job, output, 5)
        second.unplug()
        code, _, err = end_of(job, output)
    assert code == EXIT_FAILURE
    assert "rank 0 on worker-1; rank 1 on worker-2 lost the other ranks after step" in err
    with two_hosts(config, monkeypatch):
        code, out, err = end_of(start_on_hosts(config, output), output)
    assert code == 0 and "resumed from" in out, err
    assert losses(output) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_hosts
@needs_pdsh
def test_a_signal_saves_on_all_hosts_and_a_dead_host_is_named(
    config: Path, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs one job in three parts: under pdsh until Ctrl-C, without ssh until a host loses power, under pdsh again."""
    output = config.parent / "stopped"
    with two_hosts(config, monkeypatch) as hosts:
        job = start_on_hosts(config, output)
        wait_for_step(job, output, 5)
        job.send_signal(signal.SIGINT)
        code, _, err = end_of(job, output)
        assert code == EXIT_STOPPED, err

        jobs = [launcher_on(host, rank, config, output) for rank, host in enumerate(hosts)]
        wait_for_step(jobs[0], output, 20)
        hosts[1].power_off()
        code, _, err = end_of(jobs[0], output)
        jobs[1].communicate()
        assert (
            code == EXIT_FAILURE and "rank 1 on worker-2 exited or hung without an error message after step" in err
        ), err
    with two_hosts(config, monkeypatch):
        code, _, err = end_of(start_on_hosts(config, output), output)
    assert code == 0, err
    assert losses(output) == expected
