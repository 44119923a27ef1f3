"""Runs partitions on Ray actors: starts or joins a cluster, starts actors and replaces dead ones.

Only small objects pass through Ray: the config, a partition's part of the plan, progress and commit records. Actors
read audio and write shards themselves, so that neither waveforms nor features enter the object store. An actor gets its
next partition when it has finished the last one; this is sufficient back-pressure.
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
from data_prep.job.commits import Commit, PartitionProgress
from data_prep.job.errors import PreparationFailed
from data_prep.job.partitions import Plan, PlannedPartition
from data_prep.job.poison_clips import PartitionTask
from pipeline.core import ray_connection
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

OBJECT_STORE_BYTES = 100 << 20  # only small records pass through it
MAX_START_FAILURES = 10
MAX_START_PAUSE_S = 20
NODE_CHECK_S = 5


@dataclass
class _Actor:
    """An actor, its current task (None while it starts), and when it last returned something."""

    handle: Any
    task: PartitionTask | None = None
    last_response: float = field(default_factory=time.monotonic)


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """Connects to the cluster of RAY_ADDRESS, or starts one on this machine; reuses an existing connection.

    A new cluster listens on localhost only and requires a token that is kept in memory, unless RAY_AUTH_MODE is set.

    Raises:
        UserError: no cluster responds at RAY_ADDRESS.
    """
    joins = bool(os.environ.get("RAY_ADDRESS"))
    if not joins:  # ray reads these variables when it is imported
        # Makes Ray address this machine as 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if not joins and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    # Without "local" Ray would join any cluster that it finds on this machine.
    if joins:
        ray_connection.connect("RAY_ADDRESS", os.environ["RAY_ADDRESS"])
    else:
        new_cluster = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray_connection.connect("Ray", "local", **new_cluster)
    try:
        yield
    finally:
        ray.shutdown()


class ActorPool:
    """Runs partitions on as many actors as the config and the cluster allow.

    Args:
        load_encoders: whether actors load their encoders at start; False where only questions change.
    """

    def __init__(
        self, config: PrepareConfig, contracts: dict[str, EncoderContract], plan: Plan, load_encoders: bool = True
    ) -> None:
        self._config = config
        self._load_encoders = load_encoders
        self._plan = plan
        self._contracts = contracts
        self._actors: dict[Any, _Actor] = {}  # by the result it computes: an object reference or a generator
        self._start_failures = 0
        self._next_start_time = 0.0
        self._first_ready: float | None = None
        self._starts = 0
        self._node_checked = time.monotonic()

    def run(
        self,
        partitions: list[int],
        on_commit: Callable[[Commit], None],
        on_progress: Callable[[dict[int, PartitionProgress], int], None],
    ) -> float:
        """Runs partitions until all are committed.

        Args:
            partitions: indices of the partitions.
            on_commit: receives the commit record of each partition once, in any order.
            on_progress: receives the progress of the partitions in progress, and the number of actors.

        Returns:
            seconds from the first actor being ready to the last commit.

        Raises:
            PreparationFailed: actors cannot be placed or started, keep dying and no clip is responsible, or the node of
                this driver is lost.
        """
        import ray

        waiting = deque(PartitionTask(partition, self._plan.partitions[partition].clips) for partition in partitions)
        in_progress: dict[int, PartitionProgress] = {}
        started = time.monotonic()
        try:
            while waiting or any(actor.task for actor in self._actors.values()):
                self._start_actors(waiting)
                if not self._actors:
                    time.sleep(0.2)  # after a failed start; see _start_actors
                    continue
                ready, _ = ray.wait(list(self._actors), timeout=0.5, fetch_local=False)
                for reference in ready:
                    self._handle_result(reference, waiting, in_progress, on_commit)
                self._check_starts(len(partitions), time.monotonic() - started)
                self._end_stalled()
                self._check_node()
                on_progress(in_progress, len(self._actors))
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
        """Fails when this driver's node is lost: Ray itself would wait for ever."""
        import ray

        if time.monotonic() - self._node_checked < NODE_CHECK_S:
            return
        self._node_checked = time.monotonic()
        node_id = ray.get_runtime_context().get_node_id()
        if not any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes()):
            raise PreparationFailed(
                "this driver's node left the cluster; committed partitions are kept; rerun the same command to resume"
            )

    def _end_stalled(self) -> None:
        """Kills actors that stopped responding; their death is then handled like any other."""
        import ray

        for actor in self._actors.values():
            if actor.task and time.monotonic() - actor.last_response > self._config.workers.stall_timeout_s:
                ray.kill(actor.handle)
                actor.last_response = time.monotonic()

    def _max_actors(self) -> int:
        import ray

        workers = self._config.workers
        if workers.max is not None:
            return workers.max
        resources = ray.cluster_resources()
        limit = int(resources.get("CPU", 0) / workers.cpus)
        if workers.gpus:
            limit = min(limit, int(resources.get("GPU", 0) / workers.gpus))
        return max(limit, workers.min)

    def _start_actors(self, waiting: deque[PartitionTask]) -> None:
        """Starts actors while there is work for more of them.

        After a failed start it waits, longer each time: a cluster keeps placing actors on a lost machine until it
        notices the loss.
        """
        busy = sum(actor.task is not None for actor in self._actors.values())
        wanted = len(waiting) + busy
        if len(self._actors) >= wanted or time.monotonic() < self._next_start_time:
            return
        wanted = min(wanted, self._max_actors())
        while len(self._actors) < wanted:
            handle = _remote_class(self._config).remote(self._config, self._contracts)
            self._actors[handle.start.remote(self._load_encoders)] = _Actor(handle)

    def _handle_result(
        self,
        reference: Any,
        waiting: deque[PartitionTask],
        in_progress: dict[int, PartitionProgress],
        on_commit: Callable[[Commit], None],
    ) -> None:
        """Handles one result (or the death) of an actor and assigns it its next work."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        actor = self._actors.pop(reference)
        actor.last_response = time.monotonic()
        task = actor.task
        try:
            is_stream = isinstance(reference, ray.ObjectRefGenerator)
            result = ray.get(next(reference) if is_stream else reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else PreparationFailed(_summary(error)) from error
        except RayActorError as error:
            ray.kill(actor.handle)
            if task is None:
                self._start_failures += 1
                self._next_start_time = time.monotonic() + min(2**self._start_failures, MAX_START_PAUSE_S)
                if self._start_failures >= MAX_START_FAILURES:
                    raise PreparationFailed(f"workers die while starting: {_summary(error)}") from error
            else:
                in_progress.pop(task.partition, None)
                task.on_worker_death(self._config.max_attempts)
                waiting.appendleft(task)
            return
        if task is None:
            self._first_ready, self._start_failures = self._first_ready or time.monotonic(), 0
            self._starts += 1
        elif isinstance(result, Commit):
            in_progress.pop(task.partition, None)
            on_commit(result)
            actor.task = None
        elif task.probe is not None:
            task.on_probe_success()
        else:
            in_progress[task.partition] = result
            task.on_progress(result.position)
            self._actors[reference] = actor  # more progress or the commit record will follow
            return
        self._assign(actor, waiting)

    def _assign(self, actor: _Actor, waiting: deque[PartitionTask]) -> None:
        """Lets an actor resume its task or take the next one; ends it when there is none."""
        import ray

        if actor.task is None:
            if not waiting:
                ray.kill(actor.handle)
                return
            actor.task = waiting.popleft()
        task = actor.task
        if task.probe is not None:
            self._actors[actor.handle.probe.remote(task.partition, task.probe)] = actor
        else:
            planned = self._plan.partitions[task.partition]
            self._actors[actor.handle.extract.remote(task.partition, planned, task.poison_clips)] = actor


def _remote_class(config: PrepareConfig) -> Any:
    import ray

    return ray.remote(_ExtractionActor).options(
        num_cpus=config.workers.cpus, num_gpus=config.workers.gpus, max_restarts=0, max_task_retries=0
    )


class _ExtractionActor:
    """Wraps a PartitionWorker, which is imported in the actor's process only: it loads torch and the encoders."""

    def __init__(self, config: PrepareConfig, contracts: dict[str, EncoderContract]) -> None:
        self._config, self._contracts = config, contracts

    def start(self, load_encoders: bool) -> None:
        from data_prep.job.extract_partition import PartitionWorker

        self._worker = PartitionWorker(self._config, self._contracts)
        if load_encoders:
            self._worker.load_encoders()

    def extract(
        self, partition: int, planned: PlannedPartition, poison_clips: dict[int, str]
    ) -> Iterator[PartitionProgress | Commit]:
        yield from self._worker.extract(partition, planned, poison_clips)

    def probe(self, partition: int, position: int) -> None:
        self._worker.probe(partition, position)


def _summary(error: Exception) -> str:
    """Returns the last line of a Ray error, which names the cause."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
