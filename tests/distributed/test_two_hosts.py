"""Two launchers, one for each host, as `srun` and Kubernetes start them: the same run as two ranks of one host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import LIMIT_S, end_of, start_job, write_experiment

from pipeline.distributed import free_port
from pipeline.tracking import read_metrics


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
        said = [host.communicate(timeout=LIMIT_S)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(text[-3000:] for text in said)

    one, two = ([metrics["train/loss"] for _, metrics in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 4
    assert two == one
