"""What a rank and the parent of its job tell each other: through pipes, and through files of the output folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import EXIT_FAILURE
from pipeline.core.files import atomic_write

CONSOLE = "pal> "
RANKS = "ranks"  # folder of an output: one file for each rank of the latest job, where it runs
FAILURES = "failures"  # likewise, for each rank that ended with an error, why
STOP_REQUEST = "launcher.asked"  # file of an output: what the parent asks of ranks on other hosts
SAVE, END = "save", "end"
STOP_REQUEST_POLL_S = 1.0
_OTHERS_S = 5.0  # that other ranks get to find out that they lost one
SUPERVISED = "PAL_SUPERVISED"
MARKED = "PYTHON_PAL_MARKED"  # the launcher takes variables to other hosts by how their names begin, this one too


def lost_ranks(output: Path) -> str:
    """Which ranks ended or hang without a word, or that none did and yet they lost each other."""
    failures, ranks = failures_of(output), ranks_of(output)
    silent = sorted(set(ranks) - {failure["rank"] for failure in failures})
    step = max((failure["step"] for failure in failures if failure["step"] is not None), default=None)
    when = "" if step is None else f" after step {step}"
    if failures and not silent:
        who = ranks_by_host([failure["rank"] for failure in failures], ranks)
        return f"{who} lost the other ranks{when}: is the network between them down, or did one never start?"
    who = ranks_by_host(silent, ranks) if silent else "the launcher"
    return f"{who} died or hung without a word{when}: killed, or out of memory?"


def ranks_by_host(numbers: Sequence[int], ranks: Mapping[int, dict[str, Any]]) -> str:
    """`rank 2, 3 on worker-2`; without the host where there is only one."""
    by_host: dict[str, list[str]] = {}
    for number in sorted(numbers):
        by_host.setdefault(ranks[number]["host"] if number in ranks else "?", []).append(str(number))
    several = len({record["host"] for record in ranks.values()}) > 1
    return "; ".join(f"rank {', '.join(of)}" + (f" on {host}" if several else "") for host, of in by_host.items())


def failures_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in (output / FAILURES).glob("*.json")]


def ranks_of(output: Path) -> dict[int, dict[str, Any]]:
    """What the ranks of the latest job wrote of themselves in `register_rank`, by rank."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in (output / RANKS).glob("*.json")]
    return {record["rank"]: record for record in records}


def report(line: str) -> None:
    """Prints a line for the person who watches the job."""
    prefix = CONSOLE if MARKED in os.environ else ""
    print(f"{prefix}{line}", flush=True)


def watch_parent(stop: Callable[[], None]) -> None:
    """Listens to `supervise`: calls `stop` when it asks for the end, ends this process when it is gone."""
    if SUPERVISED not in os.environ:
        return

    def listen() -> None:
        while os.read(0, 1):
            stop()
        os._exit(EXIT_FAILURE)

    threading.Thread(target=listen, name="parent", daemon=True).start()


def watch_stop_request(output: Path, stop: Callable[[], None]) -> None:
    """The same on a host that the parent's pipes do not reach."""
    if SUPERVISED in os.environ or MARKED not in os.environ:
        return

    def look() -> None:
        while (asked := (output / STOP_REQUEST).read_text()) != END:
            if asked == SAVE:
                stop()
            time.sleep(STOP_REQUEST_POLL_S)
        os._exit(EXIT_FAILURE)

    threading.Thread(target=look, name="parent", daemon=True).start()


def register_rank(output: Path, rank: int) -> None:
    """Writes down where this rank runs, and forgets how it ended before."""
    (output / FAILURES / f"rank-{rank}.json").unlink(missing_ok=True)
    _write(output / RANKS / f"rank-{rank}.json", {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()})


def remove_stale_records(output: Path, world_size: int) -> None:
    """Removes what an earlier job with more ranks left of those that this one does not have."""
    for folder in (RANKS, FAILURES):
        for file in (output / folder).glob("rank-*.json"):
            if int(file.stem.removeprefix("rank-")) >= world_size:
                file.unlink()


def record_exit(output: Path, rank: int, step: int | None, code: int, message: str, *, lost_peer: bool = False) -> int:
    """Records why this rank ends, for the parent; without one, says it on stderr, and which ranks are silent.

    Returns `code`.

    Args:
        step: None where a launcher tells of a rank that cannot speak any more.
        lost_peer: it ends because another rank is gone or does not answer.
    """
    alone = SUPERVISED not in os.environ and MARKED not in os.environ
    if alone:
        print(f"pal: {message}", file=sys.stderr, flush=True)
    record = {"rank": rank, "step": step, "code": code, "message": message, "lost_peer": lost_peer, "time": time.time()}
    with contextlib.suppress(OSError):  # a full disk must not hide the reason, which is in the log as well
        _write(output / FAILURES / f"rank-{rank}.json", record)
    if alone and lost_peer:
        time.sleep(_OTHERS_S)
        print(f"pal: {lost_ranks(output)}", file=sys.stderr, flush=True)
    return code


def _write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(record).encode())  # whole: it is read while its rank may be killed
