"""Starts a launcher for one job and stays its parent: console, signals, the end. Imports no torch.

Parent and ranks talk through the launcher's inherited pipes: ranks' lines that begin with `CONSOLE` are shown, all
others go to `launcher.log`; a byte on stdin asks the ranks to save and end, and the end of stdin tells them that the
parent is gone. To other hosts pdsh brings neither, so what the parent asks stands in a file of the output as well."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from pipeline.core.files import write
from pipeline.core.ranks import free_port
from pipeline.core.redact import masked, secrets_here

CONSOLE = "pal> "
LOG = "launcher.log"
RANKS = "ranks"  # folder of an output: one file for each rank of the latest job, where it runs
FAILURES = "failures"  # likewise, for each rank that ended with an error, why
ASKED = "launcher.asked"  # file of an output: what the parent asks of ranks on other hosts
SAVE, END = "save", "end"
_ASKED_EVERY_S = 1.0
_LAST_WORDS_S = 30.0  # that hosts get to end by themselves when a rank has failed
_OTHERS_S = 5.0  # that other ranks get to find out that they lost one
_SUPERVISED = "PAL_SUPERVISED"
_MARKED = "PYTHON_PAL_MARKED"  # the launcher takes variables to other hosts by how their names begin, this one too
_LOG_TAIL_LINES = 15


def devices(nproc: int | None) -> tuple[bool, int]:
    """Whether ranks run on GPUs, and how many there are on this machine.

    Raises:
        UserError: `nproc` is not possible here.
    """
    import torch

    if nproc is not None and nproc < 1:
        raise UserError("--nproc", f"is {nproc}", "give 1 or more")
    gpus = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    if gpus and nproc and nproc > gpus:
        raise UserError("--nproc", f"is {nproc}, this machine has {gpus} GPUs", "give at most that")
    return gpus > 0, nproc or gpus or 1


def read_hostfile(path: Path, nproc: int | None) -> dict[str, int]:
    """Host -> ranks on it.

    Raises:
        UserError: missing file or malformed line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", "give a hostfile") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or match[1] in hosts:
            raise UserError(f"{path}:{number}", "is not a new host", "write one `HOST slots=N` a line")
        hosts[match[1]] = nproc or int(match[2])
    if not hosts:
        raise UserError(path, "names no host", "write one `HOST slots=N` a line")
    return hosts


def supervise(
    arguments: Sequence[str],
    output: Path,
    *,
    nproc: int | None,
    hostfile: Path | None,
    on_gpu: bool,
    module: str = "pipeline.train",
    ray_address: str | None = None,
    show: Callable[[str], None] = lambda line: print(line, end="", flush=True),
) -> tuple[int, str]:
    """Runs `MODULE ARGUMENTS` on every rank until it ends.

    Args:
        nproc: ranks on each machine, or on the Ray cluster.
        ray_address: of the cluster whose nodes take the ranks, in the place of the `deepspeed` launcher.
        show: receives the lines that ranks wrote with `say`.

    Returns:
        the exit code, and what to tell the user about a failure (empty when there was none).
    """
    if ray_address is not None:
        command = [
            sys.executable,
            "-m",
            "pipeline.launch.ray_launcher",
            "--address",
            ray_address,
            "--ranks",
            str(nproc),
        ]
        command += ["--output", str(output), *(["--gpu"] if on_gpu else [])]
    else:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--module", "--no_local_rank"]
        command += ["--master_port", str(free_port()), "--hostfile", str(hostfile or os.devnull)]
        command += ["--num_accelerators", str(nproc)] if nproc else []
    command += [module, *arguments]
    output.mkdir(parents=True, exist_ok=True)
    for folder in (FAILURES, RANKS):
        for left_over in (output / folder).glob("*.json"):
            left_over.unlink()
    (output / ASKED).write_text("")  # now, because a shared file system is slow to show a new file
    secrets = secrets_here()
    with (output / LOG).open("wb", buffering=0) as log:
        process = subprocess.Popen(
            command,
            env=_environment(nproc or 1, on_gpu),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C of the terminal reaches the ranks through us, once
        )
        with _forward_signals(process, output):
            if hostfile is not None:
                threading.Thread(target=_end_after_failure, args=(process, output), daemon=True).start()
            assert process.stdout is not None
            for line in process.stdout:
                line = masked(line, secrets)
                with contextlib.suppress(OSError):  # a full disk must not end the job
                    log.write(line.encode())
                _, marked, said = line.partition(CONSOLE)  # pdsh puts the host before it
                if marked:
                    show(said)
            code = process.wait()
    code, message = _explain(code, output)
    return code, masked(message, secrets)


def _environment(nproc: int, on_gpu: bool) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    own = {_SUPERVISED: "1", _MARKED: "1", "PYTHONUNBUFFERED": "1"}
    if not on_gpu:
        own["DS_ACCELERATOR"] = "cpu"
    # Without a bound every rank takes all cores, and ranks then wait for each other's threads.
    bound = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # ssh, under pdsh, would wait for ever for a host that is cut off.
    ssh = {"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=15 -oServerAliveCountMax=3"}
    return {**bound, **ssh, **os.environ, **own}


@contextlib.contextmanager
def _forward_signals(process: subprocess.Popen[str], output: Path) -> Iterator[None]:
    """The first signal asks the ranks to save and end; the second ends them at once."""
    asked = False

    def forward(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            _end(process, output)
            return
        asked = True
        _ask(output, SAVE)
        print("saving a checkpoint before ending (again: end at once)", file=sys.stderr, flush=True)
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write("s")
            process.stdin.flush()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            _end(process, output)


def _ask(output: Path, what: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: ranks of this host are asked through their pipes
        (output / ASKED).write_text(what)


def _end(process: subprocess.Popen[str], output: Path) -> None:
    _ask(output, END)
    os.killpg(process.pid, signal.SIGKILL)


def _end_after_failure(process: subprocess.Popen[str], output: Path) -> None:
    """Ends the job soon after a rank has failed: pdsh would wait for every host, and one that hangs never ends."""
    while process.poll() is None:
        if any((output / FAILURES).glob("*.json")):
            try:
                process.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                _end(process, output)
        time.sleep(_ASKED_EVERY_S)


def _explain(code: int, output: Path) -> tuple[int, str]:
    if code == 0:
        return 0, ""
    log = output / LOG
    failures = _failures_of(output)
    # A rank that loses another one fails too; what it says is true but not the cause.
    causes = sorted((f for f in failures if not f["lost_peer"]), key=lambda failure: failure["time"])
    if causes:
        first = causes[0]
        if first["code"] in (EXIT_USER_ERROR, EXIT_STOPPED):
            return first["code"], first["message"]
        at = "" if first["step"] is None else f" at step {first['step']}"
        who = _named([first["rank"]], _ranks_of(output))
        return EXIT_FAILURE, f"{who} failed{at}: {first['message']} (see {log})"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    text = "\n".join(f"  | {line}" for line in tail)
    return EXIT_FAILURE, f"{_lost(output)} End of {log}:\n{text}"


def _lost(output: Path) -> str:
    """Which ranks ended or hang without a word, or that none did and yet they lost each other."""
    failures, ranks = _failures_of(output), _ranks_of(output)
    silent = sorted(set(ranks) - {failure["rank"] for failure in failures})
    step = max((failure["step"] for failure in failures if failure["step"] is not None), default=None)
    when = "" if step is None else f" after step {step}"
    if failures and not silent:
        who = _named([failure["rank"] for failure in failures], ranks)
        return f"{who} lost the other ranks{when}: is the network between them down, or did one never start?"
    who = _named(silent, ranks) if silent else "the launcher"
    return f"{who} died or hung without a word{when}: killed, or out of memory?"


def _named(numbers: Sequence[int], ranks: Mapping[int, dict[str, Any]]) -> str:
    """`rank 2, 3 on worker-2`; without the host where there is only one."""
    by_host: dict[str, list[str]] = {}
    for number in sorted(numbers):
        by_host.setdefault(ranks[number]["host"] if number in ranks else "?", []).append(str(number))
    several = len({record["host"] for record in ranks.values()}) > 1
    return "; ".join(f"rank {', '.join(of)}" + (f" on {host}" if several else "") for host, of in by_host.items())


def _failures_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in (output / FAILURES).glob("*.json")]


def _ranks_of(output: Path) -> dict[int, dict[str, Any]]:
    """What the ranks of the latest job wrote of themselves in `present`, by rank."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in (output / RANKS).glob("*.json")]
    return {record["rank"]: record for record in records}


# ---- on a rank ----------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Prints a line for the person who watches the job."""
    prefix = CONSOLE if _MARKED in os.environ else ""
    print(f"{prefix}{line}", flush=True)


def watch_parent(stop: Callable[[], None]) -> None:
    """Listens to `supervise`: calls `stop` when it asks for the end, ends this process when it is gone."""
    if _SUPERVISED not in os.environ:
        return

    def listen() -> None:
        while os.read(0, 1):
            stop()
        os._exit(EXIT_FAILURE)

    threading.Thread(target=listen, name="parent", daemon=True).start()


def watch_asked(output: Path, stop: Callable[[], None]) -> None:
    """The same on a host that the parent's pipes do not reach."""
    if _SUPERVISED in os.environ or _MARKED not in os.environ:
        return

    def look() -> None:
        while (asked := (output / ASKED).read_text()) != END:
            if asked == SAVE:
                stop()
            time.sleep(_ASKED_EVERY_S)
        os._exit(EXIT_FAILURE)

    threading.Thread(target=look, name="parent", daemon=True).start()


def present(output: Path, rank: int) -> None:
    """Writes down where this rank runs, and forgets how it ended before."""
    (output / FAILURES / f"rank-{rank}.json").unlink(missing_ok=True)
    _write(output / RANKS / f"rank-{rank}.json", {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()})


def forget_ranks(output: Path, world_size: int) -> None:
    """Removes what an earlier job with more ranks left of those that this one does not have."""
    for folder in (RANKS, FAILURES):
        for file in (output / folder).glob("rank-*.json"):
            if int(file.stem.removeprefix("rank-")) >= world_size:
                file.unlink()


def leave(output: Path, rank: int, step: int | None, code: int, message: str, *, lost_peer: bool = False) -> int:
    """Records why this rank ends, for the parent; without one, says it on stderr, and which ranks are silent.

    Returns `code`.

    Args:
        step: None where a launcher tells of a rank that cannot speak any more.
        lost_peer: it ends because another rank is gone or does not answer.
    """
    alone = _SUPERVISED not in os.environ and _MARKED not in os.environ
    if alone:
        print(f"pal: {message}", file=sys.stderr, flush=True)
    record = {"rank": rank, "step": step, "code": code, "message": message, "lost_peer": lost_peer, "time": time.time()}
    with contextlib.suppress(OSError):  # a full disk must not hide the reason, which is in the log as well
        _write(output / FAILURES / f"rank-{rank}.json", record)
    if alone and lost_peer:
        time.sleep(_OTHERS_S)
        print(f"pal: {_lost(output)}", file=sys.stderr, flush=True)
    return code


def _write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(record).encode())  # whole: it is read while its rank may be killed
