"""Runs a command of this software as a process that does not outlive its parent, logged, its figures read back."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import EXIT_FAILURE, EXIT_USER_ERROR

LOG_TAIL_LINES = 15
PR_SET_PDEATHSIG = 1  # prctl(2)
LONGEST_LINE = 120
LAST_WORDS_S = 60.0  # that a command gets to save and end


class CommandFailed(Exception):
    """A command ended with an error; the message is for the user."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def run_logged(
    name: str,
    command: Sequence[str],
    log: Path,
    figures: Path,
    *,
    show: bool = False,
    ends_with_parent: bool = False,
    sign_of_life_s: float | None = None,
    alive: Callable[[str], None] = lambda _: None,
) -> tuple[Any, str]:
    """Runs `python -m COMMAND --json FIGURES`.

    Args:
        name: of the command, in messages.
        ends_with_parent: kill it when this process is killed, which otherwise leaves it to itself (Linux).
        log: receives what it says, unless `show` leaves that on the terminal.
        alive: is given the last line of the log, every `sign_of_life_s` seconds.

    Returns:
        its figures, and the last line that it wrote to the log.

    Raises:
        CommandFailed: it ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        settings: dict[str, Any] = {} if show else {"stdout": file, "stderr": subprocess.STDOUT}
        if ends_with_parent:
            settings["preexec_fn"] = _end_with_parent
        with _child([sys.executable, "-m", *command, f"--json={figures}"], settings) as process:
            while (exit_code := _wait(process, sign_of_life_s)) is None:
                alive(_last_line(log))
    lines = _read_lines(log)
    if exit_code == EXIT_USER_ERROR:
        told = [line for line in lines if line.startswith("pal: ")]
        raise CommandFailed(told[-1] if told else f"pal: {name} failed", EXIT_USER_ERROR)
    if exit_code:
        tail = "\n".join(lines[-LOG_TAIL_LINES:])
        raise CommandFailed(f"{tail}\npal: {name} ended with code {exit_code}; all it said: {log}", EXIT_FAILURE)
    return json.loads(figures.read_text(encoding="utf-8")), _last_line(log)


def make_small_experiment(folder: Path, clips: int, language_model: str) -> list[str]:
    """Writes a synthetic corpus, its log-mel features and a language model with random weights below `folder`.

    Args:
        language_model: the config of `pal scratch`, shipped or a file.

    Returns:
        the settings of an experiment that name them.
    """
    corpus, features, weights = folder / "corpus", folder / "features", folder / "language_model"
    manifest = f"{corpus}/train.jsonl"
    for command in (
        ("data_prep.synth", str(corpus), f"--clips={clips}"),
        ("data_prep.prepare", "demo_prepare", f"manifest={manifest}", f"output={features}"),
        ("pipeline.scratch", language_model, str(weights), manifest),
    ):
        print(f"{command[0]} ...", flush=True)
        run_logged(command[0], command, folder / f"{command[0]}.log", folder / f"{command[0]}.json")
    return [f"data.train={features}", f"model.language_model={weights}"]


@contextmanager
def _child(command: Sequence[str], settings: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block: asked to end first, so that training saves a checkpoint."""
    # In a session of its own a Ctrl-C of the terminal reaches it through us, once.
    process = subprocess.Popen(command, start_new_session=True, **settings)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            if _wait(process, LAST_WORDS_S) is None:
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
    return lines[-1].strip()[:LONGEST_LINE] if lines else ""
