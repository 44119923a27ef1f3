"""How the ranks of a job and its parent communicate: through pipes, and through files in the output folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.console import RankFilter, configure_logging, logger
from pipeline.core.errors import EXIT_FAILURE
from pipeline.core.files import atomic_write

CONSOLE = "pal> "  # begins a line that is for the console of the parent
RANKS = "ranks"  # folder of an output: for each rank of the latest job, a file that says where it runs
FAILURES = "failures"  # folder of an output: for each rank that ended with an error, a file that says why
STOP_REQUEST = "launcher.request"  # file of an output: what the parent requests of ranks on other hosts
SAVE, END = "save", "end"
STOP_REQUEST_POLL_S = 1.0
_PEER_GRACE_PERIOD_S = 5.0  # how long other ranks may take to notice that they lost one
SUPERVISED = "PAL_SUPERVISED"
HAS_PARENT = "PYTHON_PAL_HAS_PARENT"  # PYTHON_, because the launcher passes on variables to other hosts by prefix


def lost_ranks(output: Path) -> str:
    """Returns a sentence that names the ranks which exited or hung without recording an error.

    If every rank recorded one, they all lost each other, and the sentence says so.
    """
    failures, ranks = failures_of(output), ranks_of(output)
    silent = sorted(set(ranks) - {failure["rank"] for failure in failures})
    step = max((failure["step"] for failure in failures if failure["step"] is not None), default=None)
    when = "" if step is None else f" after step {step}"
    if failures and not silent:
        names = ranks_by_host([failure["rank"] for failure in failures], ranks)
        return f"{names} lost the other ranks{when}: is the network between them down, or did one never start?"
    names = ranks_by_host(silent, ranks) if silent else "the launcher"
    return f"{names} exited or hung without an error message{when}: killed, or out of memory?"


def ranks_by_host(numbers: Sequence[int], ranks: Mapping[int, dict[str, Any]]) -> str:
    """Returns `rank 2, 3 on worker-2`; leaves the host out if there is only one."""
    numbers_on: dict[str, list[str]] = {}
    for number in sorted(numbers):
        numbers_on.setdefault(ranks[number]["host"] if number in ranks else "?", []).append(str(number))
    several = len({record["host"] for record in ranks.values()}) > 1
    return "; ".join(
        f"rank {', '.join(on_host)}" + (f" on {host}" if several else "") for host, on_host in numbers_on.items()
    )


def failures_of(output: Path) -> list[dict[str, Any]]:
    """Returns what the ranks of the latest job recorded in `record_exit`."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in (output / FAILURES).glob("*.json")]


def ranks_of(output: Path) -> dict[int, dict[str, Any]]:
    """Returns what the ranks of the latest job recorded in `register_rank`, by rank."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in (output / RANKS).glob("*.json")]
    return {record["rank"]: record for record in records}


def print_to_parent(line: str) -> None:
    """Prints a line for the console of the command that started the job."""
    prefix = CONSOLE if HAS_PARENT in os.environ else ""
    print(f"{prefix}{line}", flush=True)


class _ParentHandler(logging.Handler):
    """Sends log records to the console of the command that started the job."""

    def emit(self, record: logging.LogRecord) -> None:
        print_to_parent(self.format(record))


def configure_rank_logging(rank: int) -> None:
    """Sends the log of this rank to the console of the parent, or to stderr if the job has no parent.

    From ranks other than 0, only warnings and errors are sent.
    """
    configure_logging(_ParentHandler() if HAS_PARENT in os.environ else None)
    logger.handlers[0].addFilter(RankFilter(rank))


def watch_parent(stop: Callable[[], None]) -> None:
    """Calls `stop` when `supervise` requests it through stdin, and ends this process when the parent is gone."""
    if SUPERVISED not in os.environ:
        return

    def read_requests() -> None:
        while os.read(0, 1):
            stop()
        os._exit(EXIT_FAILURE)

    threading.Thread(target=read_requests, name="parent", daemon=True).start()


def watch_stop_request(output: Path, stop: Callable[[], None]) -> None:
    """Does the same as `watch_parent` on a host that the pipes of the parent do not reach, through a file."""
    if SUPERVISED in os.environ or HAS_PARENT not in os.environ:
        return

    def poll_requests() -> None:
        while (request := (output / STOP_REQUEST).read_text()) != END:
            if request == SAVE:
                stop()
            time.sleep(STOP_REQUEST_POLL_S)
        os._exit(EXIT_FAILURE)

    threading.Thread(target=poll_requests, name="parent", daemon=True).start()


def register_rank(output: Path, rank: int) -> None:
    """Records where this rank runs, and removes the record of an earlier failure of this rank."""
    (output / FAILURES / f"rank-{rank}.json").unlink(missing_ok=True)
    _write(output / RANKS / f"rank-{rank}.json", {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()})


def remove_stale_records(output: Path, world_size: int) -> None:
    """Removes the records of ranks that an earlier, larger job had and this one does not have."""
    for folder in (RANKS, FAILURES):
        for file in (output / folder).glob("rank-*.json"):
            if int(file.stem.removeprefix("rank-")) >= world_size:
                file.unlink()


def record_exit(output: Path, rank: int, step: int | None, code: int, message: str, *, lost_peer: bool = False) -> int:
    """Records why this rank ends, for the parent of the job. Without a parent, also logs it, and which ranks are lost.

    Args:
        step: last step of the rank; None if a launcher records the exit of a rank that is gone.
        lost_peer: whether the rank ends because another rank is gone or does not respond.

    Returns:
        `code`.
    """
    alone = SUPERVISED not in os.environ and HAS_PARENT not in os.environ
    if alone:
        logger.error(message)
    record = {"rank": rank, "step": step, "code": code, "message": message, "lost_peer": lost_peer, "time": time.time()}
    with contextlib.suppress(OSError):  # a full disk must not hide the reason, which is in the log as well
        _write(output / FAILURES / f"rank-{rank}.json", record)
    if alone and lost_peer:
        time.sleep(_PEER_GRACE_PERIOD_S)
        logger.error(lost_ranks(output))
    return code


def _write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(record).encode())  # atomic: the parent reads it while the rank may be killed
