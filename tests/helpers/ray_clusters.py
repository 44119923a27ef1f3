"""A real Ray cluster of several nodes on this machine, started as an administrator would, and `pal submit` to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.core.ranks import free_port

TOKEN = "planted-token-of-the-cluster-31415926"
LIMIT_S = 240


class RayCluster:
    """A head with a job server on localhost, and further nodes at the same address; the cluster requires a token.

    Args:
        num_cpus: number of CPUs of the head.
        environment: further environment variables of all nodes.
    """

    def __init__(self, num_cpus: int = 1, **environment: str) -> None:
        # Short, because the paths of sockets in it are limited to 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        outer = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("RANK", "WORLD_SIZE")}
        outer["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `pal`
        on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self.environment = {**outer, **on_cpu, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **environment}
        port, dashboard = free_port(), free_port()
        self.address = f"{_own_address()}:{port}"
        self.job_server = f"http://127.0.0.1:{dashboard}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        self._start([*head, f"--ray-client-server-port={free_port()}"], num_cpus)

    def add_node(self, num_cpus: int = 1) -> subprocess.Popen[bytes]:
        return self._start([f"--address={self.address}"], num_cpus)

    def lose(self, node: subprocess.Popen[bytes]) -> set[int]:
        """Kills all processes of a node and waits until the cluster notices; returns their ids."""
        killed = self.kill(node)
        self.wait_until_known()
        return killed

    def close(self) -> None:
        for node in self.nodes[::-1]:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_until_known(self) -> None:
        """Waits until the cluster knows exactly the nodes that are running."""
        self._wait(lambda: self.alive() == len(self.nodes), "the cluster does not know its nodes")

    def kill(self, node: subprocess.Popen[bytes]) -> set[int]:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        self.nodes.remove(node)
        return {process.pid for process in processes}

    def alive(self) -> int:
        """Returns the number of nodes; 0 until the cluster answers."""
        request = urllib.request.Request(f"{self.job_server}/nodes?view=summary")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                nodes = json.load(response)["data"]["summary"]
        except (urllib.error.URLError, OSError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def _start(self, arguments: list[str], num_cpus: int) -> subprocess.Popen[bytes]:
        name = f"node{len(list(self.folder.iterdir()))}"
        log = self.folder / f"{name}.log"
        command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats", *arguments]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=100000000", f"--temp-dir={self.folder / name}"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        with log.open("wb") as file:
            node = subprocess.Popen(
                list(map(str, command)),
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)
        self._wait(lambda: node.poll() is not None or self.alive() == len(self.nodes), log)
        assert node.poll() is None, log.read_text()[-3000:]
        return node

    def _wait(self, condition: Callable[[], bool], message: object) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{message}: {self.alive()} of {len(self.nodes)} nodes"
            time.sleep(0.5)


def _own_address() -> str:
    """Returns the external address of this machine; if Ray's nodes were at 127.0.0.1, drivers would wait forever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


def start_submit(address: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts `pal submit ray_job ARGUMENTS` outside the cluster."""
    outer = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.submit", "ray_job", f"address={address}", *map(str, arguments)],
        env={**outer, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pal_submit(address: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start_submit(address, *arguments, **environment)
    out, err = process.communicate(timeout=LIMIT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
