"""Starts a launcher for one job and stays its parent: console, signals, the end. Imports no torch.

Parent and ranks talk through the launcher's inherited pipes: ranks' lines that begin with `CONSOLE` are shown, all
others go to `launcher.log`; a byte on stdin asks the ranks to save and end, and the end of stdin tells them that the
parent is gone. To other hosts pdsh brings neither, so what the parent asks stands in a file of the output as well."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from pipeline.core.ranks import free_port
from pipeline.core.redact import environment_secrets, redact
from pipeline.launch.rank_process import (
    CONSOLE,
    END,
    FAILURES,
    MARKED,
    RANKS,
    SAVE,
    STOP_REQUEST,
    STOP_REQUEST_POLL_S,
    SUPERVISED,
    failures_of,
    lost_ranks,
    ranks_by_host,
    ranks_of,
)

LOG = "launcher.log"
_LAST_WORDS_S = 30.0  # that hosts get to end by themselves when a rank has failed
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
    (output / STOP_REQUEST).write_text("")  # now, because a shared file system is slow to show a new file
    secrets = environment_secrets()
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
                line = redact(line, secrets)
                with contextlib.suppress(OSError):  # a full disk must not end the job
                    log.write(line.encode())
                _, marked, said = line.partition(CONSOLE)  # pdsh puts the host before it
                if marked:
                    show(said)
            code = process.wait()
    code, message = _explain(code, output)
    return code, redact(message, secrets)


def _environment(nproc: int, on_gpu: bool) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    own = {SUPERVISED: "1", MARKED: "1", "PYTHONUNBUFFERED": "1"}
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
        _request(output, SAVE)
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


def _request(output: Path, what: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: ranks of this host are asked through their pipes
        (output / STOP_REQUEST).write_text(what)


def _end(process: subprocess.Popen[str], output: Path) -> None:
    _request(output, END)
    os.killpg(process.pid, signal.SIGKILL)


def _end_after_failure(process: subprocess.Popen[str], output: Path) -> None:
    """Ends the job soon after a rank has failed: pdsh would wait for every host, and one that hangs never ends."""
    while process.poll() is None:
        if any((output / FAILURES).glob("*.json")):
            try:
                process.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                _end(process, output)
        time.sleep(STOP_REQUEST_POLL_S)


def _explain(code: int, output: Path) -> tuple[int, str]:
    if code == 0:
        return 0, ""
    log = output / LOG
    failures = failures_of(output)
    # A rank that loses another one fails too; what it says is true but not the cause.
    causes = sorted((f for f in failures if not f["lost_peer"]), key=lambda failure: failure["time"])
    if causes:
        first = causes[0]
        if first["code"] in (EXIT_USER_ERROR, EXIT_STOPPED):
            return first["code"], first["message"]
        at = "" if first["step"] is None else f" at step {first['step']}"
        who = ranks_by_host([first["rank"]], ranks_of(output))
        return EXIT_FAILURE, f"{who} failed{at}: {first['message']} (see {log})"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    text = "\n".join(f"  | {line}" for line in tail)
    return EXIT_FAILURE, f"{lost_ranks(output)} End of {log}:\n{text}"
