"""Runs a command as a child process that does not outlive its parent, keeps its log and reads its results back."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_USER_ERROR

LOG_TAIL_LINES = 15
PR_SET_PDEATHSIG = 1  # prctl(2)
MAX_LINE_CHARACTERS = 120
GRACE_PERIOD_S = 60.0  # a command may take this long to save and exit after SIGTERM


class CommandFailed(Exception):
    """A command ended with an error. The first line of the message is a summary; the end of the log may follow."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class LoggedCommand:
    """A command, and the files that keep what it writes.

    Attributes:
        name: name of the command in messages.
        arguments: module and arguments, which go to `python -m`.
        log: receives stdout and stderr.
        results: receives the results, through `--json`.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    results: Path


def run_logged(
    command: LoggedCommand,
    *,
    show: bool = False,
    ends_with_parent: bool = False,
    heartbeat_s: float | None = None,
    on_heartbeat: Callable[[str], None] = lambda _: None,
) -> tuple[Any, str]:
    """Runs a command to its end.

    Args:
        show: leave the output of the command on the terminal instead of writing it to the log.
        ends_with_parent: kill the command when this process is killed; otherwise it would keep running (Linux only).
        heartbeat_s: seconds between two calls of `on_heartbeat`; None never calls it.
        on_heartbeat: receives the last line of the log while the command runs.

    Returns:
        the results of the command, and the last line of its log.

    Raises:
        CommandFailed: the command ended with an error.
    """
    log, results = command.log, command.results
    log.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        settings: dict[str, Any] = {} if show else {"stdout": file, "stderr": subprocess.STDOUT}
        if ends_with_parent:
            settings["preexec_fn"] = _end_with_parent
        # -P: modules in the current folder must not replace ours.
        with _child([sys.executable, "-P", "-m", *command.arguments, f"--json={results}"], settings) as process:
            while (exit_code := _wait(process, heartbeat_s)) is None:
                on_heartbeat(_last_line(log))
    if exit_code == EXIT_USER_ERROR:
        errors = [line.removeprefix("pal: ") for line in _read_lines(log) if line.startswith("pal: ")]
        raise CommandFailed(errors[-1] if errors else f"{command.name} failed", EXIT_USER_ERROR)
    if exit_code:
        tail = "".join(f"\n  | {line}" for line in _read_lines(log)[-LOG_TAIL_LINES:])
        raise CommandFailed(f"{command.name} ended with code {exit_code}, see {log}{tail}", EXIT_FAILURE)
    return json.loads(results.read_text(encoding="utf-8")), _last_line(log)


def make_small_experiment(folder: Path, clips: int, language_model: str) -> list[str]:
    """Writes a synthetic corpus, its log-mel features and a language model with random weights below `folder`.

    Args:
        language_model: config of `pal scratch`, either a shipped one or a file.

    Returns:
        the overrides that make an experiment use them.

    Raises:
        CommandFailed: one of the commands ended with an error.
    """
    corpus, features, weights = folder / "corpus", folder / "features", folder / "language_model"
    manifest = f"{corpus}/train.jsonl"
    for arguments in (
        ("data_prep.synth", str(corpus), f"--clips={clips}"),
        ("data_prep.prepare", "demo_prepare", f"manifest={manifest}", f"output={features}"),
        ("pipeline.scratch", language_model, str(weights), manifest),
    ):
        module = arguments[0]
        logger.info("%s ...", module)
        run_logged(LoggedCommand(module, arguments, folder / f"{module}.log", folder / f"{module}.json"))
    return [f"data.train={features}", f"model.language_model={weights}"]


@contextmanager
def _child(command: Sequence[str], settings: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process that does not outlive the block; SIGTERM comes first, so that training saves a checkpoint."""
    # In a session of its own, it receives a Ctrl-C of the terminal once, through us.
    process = subprocess.Popen(command, start_new_session=True, **settings)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            if _wait(process, GRACE_PERIOD_S) is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], timeout_s: float | None) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _read_lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def _last_line(log: Path) -> str:
    lines = [line for line in _read_lines(log) if line.strip()]
    return lines[-1].strip()[:MAX_LINE_CHARACTERS] if lines else ""
