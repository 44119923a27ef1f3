"""Starts the ranks of one job on a Ray cluster, instead of the `deepspeed` launcher; `supervisor.supervise` runs it.

Each rank is a child process of its own Ray actor. Command, pipes and environment are the same as under the `deepspeed`
launcher, so a job behaves the same under both. All nodes must share a file system.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.core import ray_connection, redact
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, UserError, run_command
from pipeline.core.ranks import ACCELERATOR_VARIABLE, free_port, is_cpu_forced
from pipeline.launch import rank_process

GRACE_PERIOD_S = 30.0  # how long ranks may take to exit by themselves after one has failed
POLL_S = 1.0
# Prefixes of the variables that ranks inherit from the parent of the job, unless they hold a secret. As under other
# launchers, everything else comes from the node.
_INHERITED = ("PYTHON", "PAL_", "NCCL", "UCX", "MLFLOW", "OMP_", "TOKENIZERS_", ACCELERATOR_VARIABLE)


@contextlib.contextmanager
def ray_driver(address: str) -> Iterator[None]:
    """Makes this process a driver of the cluster at this address (`auto`: the cluster of this machine or Ray job).

    Raises:
        UserError: no cluster answers, or it rejects our token.
    """
    ray_connection.connect("--ray", address)
    try:
        yield
    finally:
        ray.shutdown()


def devices(address: str, nproc: int | None) -> tuple[bool, int]:
    """Returns whether ranks run on GPUs, and how many ranks the cluster runs; see `supervisor.devices`.

    Raises:
        UserError: there is no cluster, or `nproc` is below 1 or above the number of its GPUs or CPUs.
    """
    if nproc is not None and nproc < 1:
        raise UserError("--nproc", f"{nproc} is below 1", "give 1 or more")
    with ray_driver(address):
        resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if not is_cpu_forced() else 0
    available, kind = (gpus, "GPUs") if gpus else (int(resources.get("CPU", 0)), "CPUs")
    if (nproc or 1) > available:
        fault = f"{nproc or 1} exceeds the {available} {kind} of the cluster"
        raise UserError("--nproc", fault, f"give at most {available}")
    return gpus > 0, nproc or gpus or 1


class RankLocation(NamedTuple):
    """Where the actor of a rank runs.

    Attributes:
        host: address of its node.
        node: Ray's id of its node.
        gpus: numbers of its GPUs on that node.
        port: a free TCP port there.
    """

    host: str
    node: str
    gpus: tuple[str, ...]
    port: int


def rank_environments(locations: Sequence[RankLocation]) -> list[dict[str, str]]:
    """Returns the launcher variables of each rank, in the order of `locations`, where ranks of a node are adjacent.

    As under the `deepspeed` launcher, each rank sees the GPUs of all ranks of its node; LOCAL_RANK selects its own.
    """
    nodes = list(dict.fromkeys(location.node for location in locations))
    ranks_on = Counter(location.node for location in locations)
    gpus = {
        node: ",".join(gpu for location in locations if location.node == node for gpu in location.gpus)
        for node in nodes
    }
    next_local_rank: Counter[str] = Counter()
    environments = []
    for rank, location in enumerate(locations):
        node = location.node
        local_world_size, node_rank = str(ranks_on[node]), str(nodes.index(node))
        environments.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(locations)),
                "LOCAL_RANK": str(next_local_rank[node]),
                "LOCAL_WORLD_SIZE": local_world_size,  # read by streaming
                "LOCAL_SIZE": local_world_size,  # read by DeepSpeed, like CROSS_RANK and CROSS_SIZE
                "NODE_RANK": node_rank,
                "CROSS_RANK": node_rank,
                "CROSS_SIZE": str(len(nodes)),
                "MASTER_ADDR": locations[0].host,
                "MASTER_PORT": str(locations[0].port),
                **({"CUDA_VISIBLE_DEVICES": gpus[node]} if location.gpus else {}),
            }
        )
        next_local_rank[node] += 1
    return environments


def main(argv: Sequence[str]) -> int:
    """Runs the command on every rank until all have exited or one has failed; returns the first nonzero exit code."""
    parser = argparse.ArgumentParser(prog="ray_launcher", description=__doc__)
    parser.add_argument("--address", required=True, help="address of the Ray cluster")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument("--gpu", action="store_true", help="give each rank a GPU")
    parser.add_argument("--output", type=Path, required=True, help="output folder of the job")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="MODULE ARGUMENTS")
    arguments = parser.parse_args(argv)
    with ray_driver(arguments.address):
        # When a Ray job is stopped, all its processes receive the signal. Ray's handler would end this process, and
        # the ranks with it, before they have saved; the parent requests the stop through the pipe instead.
        for number in (signal.SIGTERM, signal.SIGINT):  # RAY_JOB_STOP_SIGNAL may be either
            signal.signal(number, signal.SIG_IGN)
        job = _Job(arguments.command, arguments.output)
        threading.Thread(target=job.forward_requests, name="parent", daemon=True).start()
        group = placement_group([{"CPU": 1, **({"GPU": 1} if arguments.gpu else {})}] * arguments.ranks)
        try:
            if not job.wait_for_resources(group):
                return rank_process.record_exit(arguments.output, 0, None, EXIT_STOPPED, "stopped before it started")
            job.start(group, arguments.ranks, int(arguments.gpu))
            return job.wait()
        finally:
            job.kill()
            remove_placement_group(group)


class _Job:
    """The ranks of one job, as their launcher sees them."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        self._command, self._output = list(command), output
        self._stop_requested = threading.Event()
        self._actors: list[Any] = []
        self._locations: list[RankLocation] = []

    def forward_requests(self) -> None:
        """Forwards stop requests of the parent to the ranks; when the parent is gone, ends this process and its actors.

        The other end is `rank_process.watch_parent`.
        """
        while os.read(0, 1):
            self._stop_requested.set()
            for actor in self._actors:
                actor.stop.remote()
        os._exit(EXIT_FAILURE)

    def wait_for_resources(self, group: PlacementGroup) -> bool:
        """Waits until the cluster has reserved a place for each rank; returns False if the parent requests a stop."""
        reported = False
        while not group.wait(POLL_S):
            if self._stop_requested.is_set():
                return False
            if not reported:
                rank_process.print_to_parent(f"waiting until the cluster has resources for {group.bundle_count} ranks")
                reported = True
        return True

    def start(self, group: PlacementGroup, ranks: int, gpus: int) -> None:
        """Starts all ranks, `gpus` GPUs for each."""
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=2)(_Rank)
        strategy = PlacementGroupSchedulingStrategy(group)
        actors = [remote.options(scheduling_strategy=strategy).remote() for _ in range(ranks)]
        located = sorted(zip(ray.get([actor.location.remote() for actor in actors]), actors, strict=True),
                         key=lambda pair: pair[0])  # fmt: skip
        self._locations = [location for location, _ in located]
        inherited = {name: value for name, value in os.environ.items()
                     if name.startswith(_INHERITED) and not redact.holds_secret(name, value)}  # fmt: skip
        for (_, actor), environment in zip(located, rank_environments(self._locations), strict=True):
            ray.get(actor.start.remote(self._command, str(Path.cwd()), {**inherited, **environment}))
            self._actors.append(actor)
            if self._stop_requested.is_set():
                actor.stop.remote()

    def wait(self) -> int:
        """Prints the output of all ranks until they have exited; returns the first nonzero exit code."""
        streams = {actor.output.remote(): rank for rank, actor in enumerate(self._actors)}
        code, deadline = 0, float("inf")
        while streams and time.monotonic() < deadline:
            ready, _ = ray.wait(list(streams), timeout=POLL_S, fetch_local=False)
            for stream in ready:
                item = self._next(stream, streams[stream])
                if isinstance(item, str):
                    print(item, end="", flush=True)
                    continue
                del streams[stream]
                if item and not code:
                    code, deadline = item, time.monotonic() + GRACE_PERIOD_S
        return code or (EXIT_FAILURE if streams else 0)

    def _next(self, stream: Any, rank: int) -> str | int:
        """Returns the next line of a rank, or its exit code."""
        try:
            item: str | int = ray.get(next(stream))
            return item
        except RayError as error:
            fault = f"Ray has lost it on node {self._locations[rank].host}: {_last_line(error)}"
            return rank_process.record_exit(self._output, rank, None, EXIT_FAILURE, fault)

    def kill(self) -> None:
        """Kills all actors, and with them their ranks."""
        for actor in self._actors:
            ray.kill(actor)


class _Rank:
    """The actor of one rank: its process and its pipes. When the actor is gone, the process reads EOF and exits."""

    def location(self) -> RankLocation:
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", []))
        return RankLocation(ray.util.get_node_ip_address(), context.get_node_id(), gpus, free_port())

    def start(self, command: list[str], folder: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command],  # -P: modules in the current folder must not replace ours
            cwd=folder,  # so that relative paths in configs mean the same as where the job was started
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def output(self) -> Iterator[str | int]:
        """Yields the lines that the rank writes, then its exit code."""
        assert self._process.stdout is not None
        for line in self._process.stdout:  # noqa: UP028 (Ray sends into generators, which a file does not support)
            yield line
        yield self._process.wait()

    def stop(self) -> None:
        """Requests that the rank saves and exits."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has exited already
            self._process.stdin.write("s")
            self._process.stdin.flush()


def _last_line(error: RayError) -> str:
    text = str(error.cause if isinstance(error, RayTaskError) else error)
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
