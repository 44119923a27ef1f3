"""Starts the ranks of one job on a Ray cluster, in the place of the `deepspeed` launcher; `launch.supervise` runs it.

A rank is a process under an actor of its own: the command, the pipes and the environment are those of the launcher, so
that the job cannot tell the two apart. Needs a file system that all nodes share. A door to Ray."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.core import redact
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, UserError, run_command
from pipeline.core.ranks import free_port
from pipeline.launch import rank_process

LAST_WORDS_S = 30.0  # that ranks get to end by themselves when one has failed
POLL_S = 1.0
CONNECT_S = 10.0
# Of the job's parent, to every rank. As with other launchers everything else, and each secret, is the nodes' own.
_PASSED_ON = ("PYTHON", "PAL_", "NCCL", "UCX", "MLFLOW", "OMP_", "TOKENIZERS_", "DS_ACCELERATOR")


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """This process as a driver of the cluster at this address (`auto`: the one of this machine or Ray job).

    Raises:
        UserError: there is none, or it asks for another token (Ray does not tell which).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, port), timeout=CONNECT_S).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, AuthenticationError) as error:
        remedy = "start one, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise UserError("--ray", f"no cluster answers our token at '{address}'", remedy) from error
    try:
        yield
    finally:
        ray.shutdown()


def devices(address: str, nproc: int | None) -> tuple[bool, int]:
    """Whether ranks run on GPUs, and how many there are on the cluster: `launch.devices` of a cluster.

    Raises:
        UserError: no cluster, or `nproc` is not possible there.
    """
    if nproc is not None and nproc < 1:
        raise UserError("--nproc", f"is {nproc}", "give 1 or more")
    with joined(address):
        resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    room, kind = (gpus, "GPUs") if gpus else (int(resources.get("CPU", 0)), "CPUs")
    if (nproc or 1) > room:
        raise UserError("--nproc", f"is {nproc or 1}, the cluster has {room} {kind}", "give at most that")
    return gpus > 0, nproc or gpus or 1


class Place(NamedTuple):
    """Where an actor is; `gpus` are the numbers on their node of those that are its own."""

    host: str
    node: str
    gpus: tuple[str, ...]
    port: int


def environments(places: Sequence[Place]) -> list[dict[str, str]]:
    """What tells each rank of its place, in the order of `places`, which has the ranks of a node side by side.

    Every rank sees the GPUs of all ranks of its node, its own at LOCAL_RANK, as under the `deepspeed` launcher.
    """
    nodes = list(dict.fromkeys(place.node for place in places))
    on_node = Counter(place.node for place in places)
    gpus = {node: ",".join(gpu for place in places if place.node == node for gpu in place.gpus) for node in nodes}
    seen: Counter[str] = Counter()
    result = []
    for rank, place in enumerate(places):
        size, node_rank = str(on_node[place.node]), str(nodes.index(place.node))
        result.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(seen[place.node]),
                "LOCAL_WORLD_SIZE": size,  # read by streaming
                "LOCAL_SIZE": size,  # read by DeepSpeed, like CROSS_RANK and CROSS_SIZE
                "NODE_RANK": node_rank,
                "CROSS_RANK": node_rank,
                "CROSS_SIZE": str(len(nodes)),
                "MASTER_ADDR": places[0].host,
                "MASTER_PORT": str(places[0].port),
                **({"CUDA_VISIBLE_DEVICES": gpus[place.node]} if place.gpus else {}),
            }
        )
        seen[place.node] += 1
    return result


def main(argv: Sequence[str]) -> int:
    """Runs the command on every rank until all have ended, or one has failed; the first code that is not 0."""
    parser = argparse.ArgumentParser(prog="ray_ranks", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each rank")
    parser.add_argument("--output", type=Path, required=True, help="the job's folder, see launch.py")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="MODULE ARGUMENTS")
    arguments = parser.parse_args(argv)
    with joined(arguments.address):
        # When a Ray job is stopped, all its processes are signalled. The parent asks for the same through the pipe,
        # and this process, as Ray's handler has it, would end and take the ranks along before they have saved.
        for number in (signal.SIGTERM, signal.SIGINT):  # RAY_JOB_STOP_SIGNAL may be either
            signal.signal(number, signal.SIG_IGN)
        job = _Job(arguments.command, arguments.output)
        threading.Thread(target=job.listen, name="parent", daemon=True).start()
        group = placement_group([{"CPU": 1, **({"GPU": 1} if arguments.gpu else {})}] * arguments.ranks)
        try:
            if not job.wait_for_room(group):
                return rank_process.record_exit(arguments.output, 0, None, EXIT_STOPPED, "stopped before it began")
            job.start(group, arguments.ranks, int(arguments.gpu))
            return job.follow()
        finally:
            job.end()
            remove_placement_group(group)


class _Job:
    """The ranks of one job, seen from their launcher."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        self._command, self._output = list(command), output
        self._stopped = threading.Event()
        self._actors: list[Any] = []
        self._places: list[Place] = []

    def listen(self) -> None:
        """Hands on what the parent asks for; see `launch.watch_parent`. Actors end with this process."""
        while os.read(0, 1):
            self._stopped.set()
            for actor in self._actors:
                actor.stop.remote()
        os._exit(EXIT_FAILURE)

    def wait_for_room(self, group: PlacementGroup) -> bool:
        """False when the parent asks for the end before there is room."""
        told = False
        while not group.wait(POLL_S):
            if self._stopped.is_set():
                return False
            if not told:
                rank_process.report(f"waiting until the cluster has room for {group.bundle_count} ranks")
                told = True
        return True

    def start(self, group: PlacementGroup, ranks: int, gpus: int) -> None:
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=2)(_Rank)
        strategy = PlacementGroupSchedulingStrategy(group)
        actors = [remote.options(scheduling_strategy=strategy).remote() for _ in range(ranks)]
        placed = sorted(zip(ray.get([actor.place.remote() for actor in actors]), actors, strict=True),
                        key=lambda pair: pair[0])  # fmt: skip
        self._places = [place for place, _ in placed]
        passed_on = {name: value for name, value in os.environ.items()
                     if name.startswith(_PASSED_ON) and not redact.holds_secret(name, value)}  # fmt: skip
        for (_, actor), own in zip(placed, environments(self._places), strict=True):
            ray.get(actor.start.remote(self._command, str(Path.cwd()), {**passed_on, **own}))
            self._actors.append(actor)
            if self._stopped.is_set():
                actor.stop.remote()

    def follow(self) -> int:
        streams = {actor.lines.remote(): rank for rank, actor in enumerate(self._actors)}
        code, deadline = 0, float("inf")
        while streams and time.monotonic() < deadline:
            ready, _ = ray.wait(list(streams), timeout=POLL_S, fetch_local=False)
            for stream in ready:
                said = self._next(stream, streams[stream])
                if isinstance(said, str):
                    print(said, end="", flush=True)
                    continue
                del streams[stream]
                if said and not code:
                    code, deadline = said, time.monotonic() + LAST_WORDS_S
        return code or (EXIT_FAILURE if streams else 0)

    def _next(self, stream: Any, rank: int) -> str | int:
        """The rank's next line, or its exit code."""
        try:
            said: str | int = ray.get(next(stream))
            return said
        except RayError as error:
            fault = f"Ray has lost it on node {self._places[rank].host}: {_last_line(error)}"
            return rank_process.record_exit(self._output, rank, None, EXIT_FAILURE, fault)

    def end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


class _Rank:
    """The actor: one rank's process and its pipes. A process whose actor is gone finds its stdin closed, and ends."""

    def place(self) -> Place:
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", []))
        return Place(ray.util.get_node_ip_address(), context.get_node_id(), gpus, free_port())

    def start(self, command: list[str], folder: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,  # relative paths of configs mean what they mean where the job was started
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def lines(self) -> Iterator[str | int]:
        """What the rank says, then its exit code."""
        assert self._process.stdout is not None
        for line in self._process.stdout:  # noqa: UP028 (Ray sends into generators, which a file does not know)
            yield line
        yield self._process.wait()

    def stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write("s")
            self._process.stdin.flush()


def _last_line(error: RayError) -> str:
    text = str(error.cause if isinstance(error, RayTaskError) else error)
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
