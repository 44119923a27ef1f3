"""Runs a function on several ranks, each in its own process, with a time limit and errors that name ranks."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.core.ranks import free_port

START_METHOD = "spawn"  # torch's threads do not survive a fork


@dataclass(frozen=True)
class _Group:
    """What all ranks of a call have in common."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    world_size: int
    port: int
    limit_s: float


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, limit_s: float = 240) -> list[Any]:
    """Returns the results of `function(*arguments)` by rank; it must be importable, and its rank is in the environment.

    Raises:
        AssertionError: a rank raised an error, died or did not finish within `limit_s`.
    """
    context = multiprocessing.get_context(START_METHOD)
    results: Any = context.Queue()
    group = _Group(function, arguments, world_size, free_port(), limit_s)
    processes = [context.Process(target=_rank, args=(group, rank, results)) for rank in range(world_size)]
    for process in processes:
        process.start()
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + limit_s
    try:
        while len(outcomes) < world_size:
            died = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in outcomes]
            try:
                rank, succeeded, value = results.get(timeout=1.0)
            except queue.Empty:
                assert not died, f"rank {died[0]} died with exit code {processes[died[0]].exitcode}"
                missing = sorted(set(range(world_size)) - outcomes.keys())
                assert time.monotonic() < deadline, f"ranks {missing} hang: no result after {limit_s} s"
                continue
            assert succeeded, f"rank {rank} failed:\n{value}"
            outcomes[rank] = (succeeded, pickle.loads(value))
    finally:
        for process in processes:
            process.kill() if len(outcomes) < world_size else process.join(30)
    return [outcomes[rank][1] for rank in range(world_size)]


def _rank(group: _Group, rank: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(group.world_size),
        LOCAL_WORLD_SIZE=str(group.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(group.port),
        DS_ACCELERATOR="cpu",
    )
    faulthandler.dump_traceback_later(group.limit_s - 5)  # shows where each rank waits
    try:
        import torch

        torch.set_num_threads(1)
        # As bytes, because a tensor in a queue is lost when its process ends.
        results.put((rank, True, pickle.dumps(group.function(*group.arguments))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
