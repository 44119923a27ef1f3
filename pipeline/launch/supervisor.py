"""Starts a launcher for one job and supervises it: console output, signals, failures. Imports torch only to count GPUs.

Parent and ranks communicate through the pipes that the ranks inherit from the launcher. The text after
`CONSOLE` in a line is shown (pdsh writes the host in front of it), and every line goes to `launcher.log`. A byte on
stdin requests that the ranks save and exit; EOF means that the parent died. pdsh forwards neither to other hosts, so
the parent also writes its requests to a file in the output folder.
"""

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
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from pipeline.core.ranks import ACCELERATOR_VARIABLE, free_port, is_cpu_forced
from pipeline.core.redact import environment_secrets, redact
from pipeline.launch.rank_process import (
    CONSOLE,
    END,
    FAILURES,
    HAS_PARENT,
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
_GRACE_PERIOD_S = 30.0  # how long hosts may take to exit by themselves after a rank has failed
_LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a job run.

    Attributes:
        nproc: ranks on each machine, or on the whole Ray cluster; None takes the slots of the hostfile.
        on_gpu: whether the ranks compute on GPUs.
        hostfile: machines that the launcher reaches by ssh; None means this machine.
        ray_address: address of the Ray cluster whose nodes run the ranks; None means no Ray, but the `deepspeed`
            launcher.
    """

    nproc: int | None
    on_gpu: bool
    hostfile: Path | None = None
    ray_address: str | None = None


def devices(nproc: int | None) -> tuple[bool, int]:
    """Returns whether ranks run on GPUs, and how many ranks this machine runs.

    Raises:
        UserError: `nproc` is below 1 or above the number of GPUs.
    """
    import torch

    if nproc is not None and nproc < 1:
        raise UserError("--nproc", f"{nproc} is below 1", "give 1 or more")
    gpus = torch.cuda.device_count() if not is_cpu_forced() else 0
    if gpus and nproc and nproc > gpus:
        raise UserError("--nproc", f"{nproc} exceeds the {gpus} GPUs of this machine", f"give at most {gpus}")
    return gpus > 0, nproc or gpus or 1


def read_hostfile(path: Path, nproc: int | None) -> dict[str, int]:
    """Returns the number of ranks on each host, in the order of the file.

    Args:
        nproc: ranks on each host, instead of the slots of the file.

    Raises:
        UserError: the file is missing, names no host, or has a malformed or repeated line.
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
            raise UserError(f"{path}:{number}", "is malformed or repeats a host", "write one `HOST slots=N` per line")
        hosts[match[1]] = nproc or int(match[2])
    if not hosts:
        raise UserError(path, "names no host", "write one `HOST slots=N` per line")
    return hosts


def supervise(
    arguments: Sequence[str],
    output: Path,
    placement: Placement,
    *,
    module: str = "pipeline.train",
    on_line: Callable[[str], None] = lambda line: print(line, end="", flush=True),
) -> tuple[int, str]:
    """Runs `MODULE ARGUMENTS` on every rank until all have exited.

    Args:
        output: folder of the job; receives the launcher's log and the records of the ranks.
        on_line: receives each line that a rank wrote for the console.

    Returns:
        the exit code, and an explanation of a failure for the user (empty if there was none).
    """
    output.mkdir(parents=True, exist_ok=True)
    for folder in (FAILURES, RANKS):
        for stale in (output / folder).glob("*.json"):
            stale.unlink()
    (output / STOP_REQUEST).write_text("")  # now, because a shared file system is slow to show a new file
    secrets = environment_secrets()
    with (output / LOG).open("wb", buffering=0) as log:
        process = subprocess.Popen(
            [*_launcher(placement, output), module, *arguments],
            env=_environment(placement),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C of the terminal reaches the ranks once, through us
        )
        with _forward_signals(process, output):
            if placement.hostfile is not None:
                threading.Thread(target=_end_after_failure, args=(process, output), daemon=True).start()
            assert process.stdout is not None
            for line in process.stdout:
                line = redact(line, secrets)
                with contextlib.suppress(OSError):  # a full disk must not end the job
                    log.write(line.encode())
                _, marker, text = line.partition(CONSOLE)  # pdsh writes the host in front of it
                if marker:
                    on_line(text)
            code = process.wait()
    code, message = _explain(code, output)
    return code, redact(message, secrets)


def _launcher(placement: Placement, output: Path) -> list[str]:
    python = [sys.executable, "-P", "-m"]  # -P: modules in the current folder must not replace ours
    if placement.ray_address is not None:
        command = [*python, "pipeline.launch.ray_launcher", "--address", placement.ray_address]
        command += ["--ranks", str(placement.nproc), "--output", str(output)]
        return [*command, "--gpu"] if placement.on_gpu else command
    command = [*python, "pipeline.launch.deepspeed_launcher", "--module", "--no_local_rank"]
    command += ["--master_port", str(free_port()), "--hostfile", str(placement.hostfile or os.devnull)]
    return [*command, "--num_accelerators", str(placement.nproc)] if placement.nproc else command


def _environment(placement: Placement) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // (placement.nproc or 1))
    forced = {SUPERVISED: "1", HAS_PARENT: "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    if not placement.on_gpu:
        forced[ACCELERATOR_VARIABLE] = "cpu"
    # Without a limit, every rank would use all cores, and ranks would wait for each other's threads.
    defaults = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # Without these, ssh under pdsh would wait forever for a host that is cut off.
    defaults["PDSH_SSH_ARGS_APPEND"] = "-oServerAliveInterval=15 -oServerAliveCountMax=3"
    if placement.hostfile is None and placement.ray_address is None:
        # Ranks of one machine listen for each other on its loopback interface only.
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {**defaults, **os.environ, **forced}


@contextlib.contextmanager
def _forward_signals(process: subprocess.Popen[str], output: Path) -> Iterator[None]:
    """Forwards signals: the first one requests that the ranks save and exit, the second one kills them."""
    stop_requested = False

    def forward(number: int, _: object) -> None:
        nonlocal stop_requested
        if stop_requested:
            _kill(process, output)
            return
        stop_requested = True
        _request(output, SAVE)
        logger.info("saving a checkpoint before exiting (signal again to exit at once)")
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write("s")
            process.stdin.flush()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            _kill(process, output)


def _request(output: Path, request: str) -> None:
    with contextlib.suppress(OSError):  # on a full disk, the pipes still reach the ranks of this host
        (output / STOP_REQUEST).write_text(request)


def _kill(process: subprocess.Popen[str], output: Path) -> None:
    _request(output, END)
    os.killpg(process.pid, signal.SIGKILL)


def _end_after_failure(process: subprocess.Popen[str], output: Path) -> None:
    """Ends the job soon after a rank has failed: pdsh would wait for every host, and one that hangs never exits."""
    while process.poll() is None:
        if any((output / FAILURES).glob("*.json")):
            try:
                process.wait(_GRACE_PERIOD_S)
            except subprocess.TimeoutExpired:
                _kill(process, output)
        time.sleep(STOP_REQUEST_POLL_S)


def _explain(code: int, output: Path) -> tuple[int, str]:
    """Returns the exit code of the job, and the cause of a failure as the ranks recorded it."""
    if code == 0:
        return 0, ""
    log = output / LOG
    # A rank that loses another one fails too; its message is true but not the cause.
    causes = [failure for failure in failures_of(output) if not failure["lost_peer"]]
    if causes:
        cause = min(causes, key=lambda failure: failure["time"])
        if cause["code"] in (EXIT_USER_ERROR, EXIT_STOPPED):
            return cause["code"], cause["message"]
        when = "" if cause["step"] is None else f" at step {cause['step']}"
        rank = ranks_by_host([cause["rank"]], ranks_of(output))
        return EXIT_FAILURE, f"{rank} failed{when}: {cause['message']} (see {log})"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    text = "\n".join(f"  | {line}" for line in tail)
    return EXIT_FAILURE, f"{lost_ranks(output)} End of {log}:\n{text}"
