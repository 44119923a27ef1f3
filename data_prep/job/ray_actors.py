"""Runs partitions on Ray actors. The one door to Ray: starts or joins a cluster, replaces dead actors, counts attempts.

Only rows, progress and commit records travel: actors read the plan, decode, encode and write shards themselves, so
that nothing fills the object store. The driver hands an actor the next partition when it asks, which is all the
back-pressure there is to need.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.job.commits import Commit, Progress
from data_prep.job.partitions import Plan, PlannedPartition
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

OBJECT_STORE_BYTES = 100 << 20  # nothing but records passes through it
MAX_START_FAILURES = 10
MAX_START_PAUSE_S = 20
NODE_CHECK_S = 5


class PreparationFailed(RuntimeError):
    """A failure at run time, in one line."""


@dataclass
class _Task:
    """A partition that is not committed yet.

    Attributes:
        position: clips before it were done in the attempt that died last.
        deaths: of workers, in a row, at this position.
        probe: the clip that goes through alone next, to find the one that kills its worker; None when not searching.
        attempts: deaths by clip that was alone with its worker.
        poison_clips: clips given up, with the reason's detail.
    """

    partition: int
    position: int = 0
    deaths: int = 0
    probe: int | None = None
    attempts: dict[int, int] = field(default_factory=dict)
    poison_clips: dict[int, str] = field(default_factory=dict)


@dataclass
class _Actor:
    handle: Any
    task: _Task | None = None
    last_sign: float = field(default_factory=time.monotonic)


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster of RAY_ADDRESS, the one this process is connected to, or a fresh one on this machine.

    A fresh one listens on localhost alone, and is closed to other users by a token that is never written down, unless
    RAY_AUTH_MODE says otherwise.
    """
    joins = "RAY_ADDRESS" in os.environ
    if not joins:  # read when ray is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # there Ray knows the machine as 127.0.0.1
    if not joins and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    # "local": without it ray joins whatever cluster it finds on this machine.
    fresh = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **({} if joins else fresh))
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        raise UserError("RAY_ADDRESS", f"no cluster answers at {address}", "start it, or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


class Cluster:
    """Works through partitions with as many actors as the config and the cluster allow.

    Args:
        load_encoders: False where only questions change.
    """

    def __init__(
        self, config: PrepareConfig, contracts: dict[str, EncoderContract], plan: Plan, load_encoders: bool = True
    ) -> None:
        self._config = config
        self._load_encoders = load_encoders
        self._plan = plan
        self._contracts = contracts
        self._actors: dict[Any, _Actor] = {}  # by what it is doing: an object reference or a generator of them
        self._start_failures = 0
        self._no_start_before = 0.0
        self._first_ready: float | None = None
        self._starts = 0
        self._node_checked = time.monotonic()

    def run(
        self,
        partitions: list[int],
        on_commit: Callable[[Commit], None],
        on_progress: Callable[[dict[int, Progress], int], None],
    ) -> float:
        """Does these partitions; each reaches `on_commit` once, in any order.

        Args:
            on_progress: receives the partitions under work and the number of actors.

        Returns:
            seconds from the first actor being ready to the last commit.

        Raises:
            PreparationFailed: actors cannot be placed or started, or keep dying without a clip to blame; or the node
                that this driver belongs to is lost.
        """
        import ray

        waiting = deque(_Task(partition) for partition in partitions)
        under_work: dict[int, Progress] = {}
        started = time.monotonic()
        try:
            while waiting or any(actor.task for actor in self._actors.values()):
                self._fit_actors(waiting)
                if not self._actors:
                    time.sleep(0.2)  # a machine was lost; see _fit_actors
                    continue
                ready, _ = ray.wait(list(self._actors), timeout=0.5, fetch_local=False)
                for reference in ready:
                    self._advance(reference, waiting, under_work, on_commit)
                self._check_starts(len(partitions), time.monotonic() - started)
                self._end_stalled()
                self._check_node()
                on_progress(under_work, len(self._actors))
        finally:
            for actor in self._actors.values():
                ray.kill(actor.handle)
        return time.monotonic() - (self._first_ready or started)

    def _check_starts(self, partitions: int, elapsed_s: float) -> None:
        workers = self._config.workers
        if elapsed_s > workers.start_timeout_s and self._starts < min(workers.min, partitions):
            raise PreparationFailed(
                f"{self._starts} of workers.min {workers.min} workers started within workers.start_timeout_s "
                f"{workers.start_timeout_s}: the cluster cannot place {workers.cpus} CPUs and {workers.gpus} GPUs each"
            )

    def _check_node(self) -> None:
        """Ray lets a driver wait for ever when the node that it talks through is gone."""
        import ray

        if time.monotonic() - self._node_checked < NODE_CHECK_S:
            return
        self._node_checked = time.monotonic()
        own = ray.get_runtime_context().get_node_id()
        if not any(node["NodeID"] == own and node["Alive"] for node in ray.nodes()):
            raise PreparationFailed("this driver's node left the cluster; what is committed is kept, start again")

    def _end_stalled(self) -> None:
        """Kills actors that give no sign any more; their death is then found like any other."""
        import ray

        for actor in self._actors.values():
            if actor.task and time.monotonic() - actor.last_sign > self._config.workers.stall_timeout_s:
                ray.kill(actor.handle)
                actor.last_sign = time.monotonic()

    def _bound(self) -> int:
        import ray

        workers = self._config.workers
        if workers.max is not None:
            return workers.max
        resources = ray.cluster_resources()
        fits = int(resources.get("CPU", 0) / workers.cpus)
        if workers.gpus:
            fits = min(fits, int(resources.get("GPU", 0) / workers.gpus))
        return max(fits, workers.min)

    def _fit_actors(self, waiting: deque[_Task]) -> None:
        """Starts actors while there is work for more of them; those without work left have ended by themselves.

        After a failed start it waits, longer each time: a cluster goes on placing actors on a machine that it has lost
        until it notices.
        """
        busy = sum(actor.task is not None for actor in self._actors.values())
        wanted = len(waiting) + busy
        if len(self._actors) >= wanted or time.monotonic() < self._no_start_before:
            return
        wanted = min(wanted, self._bound())
        while len(self._actors) < wanted:
            handle = _remote_worker(self._config).remote(self._config, self._contracts)
            self._actors[handle.start.remote(self._load_encoders)] = _Actor(handle)

    def _advance(
        self,
        reference: Any,
        waiting: deque[_Task],
        under_work: dict[int, Progress],
        on_commit: Callable[[Commit], None],
    ) -> None:
        """Takes one result (or the death) of an actor and gives it its next work."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        actor = self._actors.pop(reference)
        actor.last_sign = time.monotonic()
        task = actor.task
        try:
            is_stream = isinstance(reference, ray.ObjectRefGenerator)
            result = ray.get(next(reference) if is_stream else reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else PreparationFailed(_last_line(error)) from error
        except RayActorError as error:
            ray.kill(actor.handle)
            if task is None:
                self._start_failures += 1
                self._no_start_before = time.monotonic() + min(2**self._start_failures, MAX_START_PAUSE_S)
                if self._start_failures >= MAX_START_FAILURES:
                    raise PreparationFailed(f"workers die while starting: {_last_line(error)}") from error
            else:
                under_work.pop(task.partition, None)
                self._on_worker_death(task)
                waiting.appendleft(task)
            return
        if task is None:
            self._first_ready, self._start_failures = self._first_ready or time.monotonic(), 0
            self._starts += 1
        elif isinstance(result, Commit):
            under_work.pop(task.partition, None)
            on_commit(result)
            actor.task = None
        elif task.probe is not None:
            task.probe += 1
        else:
            under_work[task.partition] = result
            if result.position > task.position:
                task.position, task.deaths = result.position, 0
            self._actors[reference] = actor  # the stream goes on
            return
        self._next(actor, waiting)

    def _next(self, actor: _Actor, waiting: deque[_Task]) -> None:
        import ray

        if actor.task is None:
            if not waiting:
                ray.kill(actor.handle)
                return
            actor.task = waiting.popleft()
        task = actor.task
        if task.probe is not None and task.probe >= self._plan.partitions[task.partition].clips:
            task.probe = None
        if task.probe is not None:
            self._actors[actor.handle.probe.remote(task.partition, task.probe)] = actor
        else:
            planned = self._plan.partitions[task.partition]
            self._actors[actor.handle.extract.remote(task.partition, planned, task.poison_clips)] = actor

    def _on_worker_death(self, task: _Task) -> None:
        """Draws the conclusion from a death: machines are lost, so the first one only means another try.

        After the second one at the same place the clips from there on go through alone, until one kills its worker
        `max_attempts` times.

        Raises:
            PreparationFailed: the partition kills its worker though each clip alone does not.
        """
        limit = self._config.max_attempts
        if task.probe is not None:
            task.attempts[task.probe] = task.attempts.get(task.probe, 0) + 1
            if task.attempts[task.probe] >= limit:
                task.poison_clips[task.probe] = f"killed its worker in {limit} of {limit} attempts"
                task.probe, task.deaths = None, 0
            return
        task.deaths += 1
        if task.deaths >= 2:
            task.probe = task.position
        if task.deaths >= 2 + limit:
            raise PreparationFailed(
                f"partition {task.partition} kills its worker near clip {task.position} though each clip passes alone, "
                "probably for want of memory: lower batch_s"
            )


def _remote_worker(config: PrepareConfig) -> Any:
    import ray

    return ray.remote(_Worker).options(
        num_cpus=config.workers.cpus, num_gpus=config.workers.gpus, max_restarts=0, max_task_retries=0
    )


class _Worker:
    """The actor: a thin shell around PartitionWorker, which is imported and built inside it only."""

    def __init__(self, config: PrepareConfig, contracts: dict[str, EncoderContract]) -> None:
        self._config, self._contracts = config, contracts

    def start(self, load_encoders: bool) -> None:
        from data_prep.job.extract_partition import PartitionWorker

        self._worker = PartitionWorker(self._config, self._contracts)
        if load_encoders:
            self._worker.load_encoders()

    def extract(
        self, partition: int, planned: PlannedPartition, poison_clips: dict[int, str]
    ) -> Iterator[Progress | Commit]:
        yield from self._worker.extract(partition, planned, poison_clips)

    def probe(self, partition: int, position: int) -> None:
        self._worker.probe(partition, position)


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
