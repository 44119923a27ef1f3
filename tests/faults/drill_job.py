"""A training job that `pal drill` disturbs: the real command, its output and its ranks."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from pipeline.launch import rank_process
from pipeline.tracking import writer

TIMEOUT_S = 240.0
SECRET = "planted-by-pal-drill"
STEPS_BETWEEN_FAULTS = 5


class DrillFailed(Exception):
    """A job did not reach the point at which a fault can be injected."""


class Job:
    """`pal train` on one output folder, and its output."""

    def __init__(self, command: Sequence[str], output: Path, log: Path) -> None:
        self.output, self.log = output, log
        environment = {**os.environ, "DRILL_SECRET_KEY": SECRET}
        with log.open("w", encoding="utf-8") as file:
            # In a session of its own, so that no signal to it reaches the drill.
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        """Everything that the job has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, event: str, condition: Callable[[], bool], *, running: bool = True) -> None:
        """Waits until a condition holds.

        Args:
            event: name of the event, for messages.
            running: whether the job must not exit before.

        Raises:
            DrillFailed: the job exited before, or the condition does not hold after `TIMEOUT_S`.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if running and self.process.poll() is not None:
                raise DrillFailed(f"the job exited with code {self.process.returncode} before {event}: see {self.log}")
            if time.monotonic() > deadline:
                raise DrillFailed(f"no {event} after {TIMEOUT_S:.0f} s: see {self.log}")
            time.sleep(0.02)

    def wait_for_text(self, text: str, times: int = 1) -> None:
        self.wait_until(f"'{text}'", lambda: self.text.count(text) >= times)

    def train_further(self) -> None:
        """Waits for some more steps."""
        step = steps_of(self.output)
        self.wait_until("more steps", lambda: steps_of(self.output) >= step + STEPS_BETWEEN_FAULTS)

    def rank(self, rank: int) -> psutil.Process:
        record = json.loads((self.output / rank_process.RANKS / f"rank-{rank}.json").read_text(encoding="utf-8"))
        return psutil.Process(record["pid"])

    def wait(self) -> int:
        """Waits until the job exits; returns its exit code."""
        self.wait_until("exit", lambda: self.process.poll() is not None, running=False)
        return self.process.returncode


def steps_of(output: Path) -> int:
    """Returns the last step that is recorded, even if it will be repeated."""
    file = output / writer.METRICS
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
