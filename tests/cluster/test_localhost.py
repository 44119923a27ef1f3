"""Servers that are started for one machine listen on localhost only."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.core.ranks import free_port

LIMIT_S = 120
LOCAL_RAY = """
from data_prep.job.ray_actors import ray_cluster

with ray_cluster():
    import ray  # reads its settings

    actor = ray.remote(num_cpus=0)(type("Actor", (), {"work": lambda self: 0})).remote()
    ray.get(actor.work.remote())
    print("ready", flush=True)
    input()
"""


def listeners(process: int) -> set[tuple[str, int]]:
    """Returns the addresses and ports on which a process and its descendants listen."""
    sockets = []
    for member in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited meanwhile
            sockets += member.net_connections("tcp")
    return {
        (socket.laddr.ip.removeprefix("::ffff:"), socket.laddr.port) for socket in sockets if socket.status == "LISTEN"
    }


def test_the_local_ray_of_preparation_listens_on_localhost() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", LOCAL_RAY], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        addresses = listeners(process.pid)
        process.communicate("\n", timeout=LIMIT_S)
    assert process.returncode == 0 and len(addresses) >= 5  # GCS, raylet, agents, the driver, the actor
    assert all(ipaddress.ip_address(address).is_loopback for address, _ in addresses), addresses


def test_the_mlflow_ui_listens_on_localhost(tmp_path: Path) -> None:
    """Runs the command of `make ui` with another port and database."""
    dry = ["make", "--dry-run", "--silent", "--old-file=.venv/.installed", "ui"]
    recipe = subprocess.run(dry, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    port = free_port()
    changes = {
        ".venv/bin/mlflow": str(Path(sys.executable).with_name("mlflow")),
        "sqlite:///runs/demo/mlflow.db": f"sqlite:///{tmp_path}/mlflow.db",
        "5000": str(port),
    }
    command = [changes.get(word, word) for word in recipe.splitlines()[-1].split()]
    assert set(changes.values()) <= set(command), recipe
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not listeners(process.pid):
                assert process.poll() is None and time.monotonic() < deadline, "it does not start"
                time.sleep(0.2)
            time.sleep(3)  # time for it to open further ports
            addresses = listeners(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert ("127.0.0.1", port) in addresses
    assert all(ipaddress.ip_address(address).is_loopback for address, _ in addresses), addresses
