"""Text for people: log lines, progress, tables and durations.

A command prints its results to stdout. Everything else it reports is a record of the logger `pal`, which appears on
stderr as `pal: ...`. On the ranks of a job, `pipeline.launch.rank_process` sends these records to the console of the
command that started the job.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

logger = logging.getLogger("pal")
RATE_OVER_S = 600.0  # a bar's time left follows from the rate in this time
PLAIN_EVERY_S = 15.0  # seconds between two progress lines if there is no terminal for a bar


class RankFilter(logging.Filter):
    """Passes every record on rank 0, and warnings and errors on the other ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self._rank == 0 or record.levelno >= logging.WARNING


def configure_logging(handler: logging.Handler | None = None) -> None:
    """Sends the records of the logger `pal` to one handler, which by default writes them to stderr as `pal: ...`."""
    if handler is None:
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter("pal: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to `sys.stderr` as it is when a record is emitted, not as it was when logging was configured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class Progress:
    """Shows the progress of long work on stderr: as a bar on a terminal, otherwise as a log line every 15 s.

    The time left follows from the rate since the first units were finished, because these take the start-up with them
    (imports, loading a model, starting workers).

    Args:
        total: number of units of work.
        unit: plural name of the units ("clips").
        done: number of units that were finished before this process started.
        alike: whether the first units take no longer than the others, as trials that start processes of their own do.
            The rate is then that since the start.
    """

    def __init__(self, total: int, unit: str, done: int = 0, *, alike: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._total, self._unit = total, unit
        self._done = self._initially_done = done
        self._last = time.monotonic()
        self._rate_from = (done, self._last) if alike else None  # units, time
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (
                MofNCompleteColumn(),
                TextColumn(unit),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=console, speed_estimate_period=RATE_OVER_S)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def update(self, done: int, note: str = "", *, force: bool = False) -> None:
        """Shows the number of finished units, with a note such as a rate.

        Args:
            force: write a log line even if the last one is less than 15 s old.
        """
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=note)
            return
        now = time.monotonic()
        if self._rate_from is None and done > self._initially_done:
            self._rate_from = done, now
        if not force and now - self._last < PLAIN_EVERY_S:
            return
        self._last = now
        first_done, start = self._rate_from or (done, now)
        rate = (done - first_done) / max(now - start, 1e-9)
        known = rate > 0 or done >= self._total
        remaining = f"{format_duration((self._total - done) / (rate or 1))} left" if known else "time left unknown"
        logger.info(", ".join(filter(None, (f"{done}/{self._total} {self._unit}", note, remaining))))

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds to the number of finished units."""
        self.update(self._done + count, note)

    def close(self) -> None:
        """Stops the bar; its last state stays on the terminal."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(total: int, unit: str, done: int = 0, *, alike: bool = False) -> Iterator[Progress]:
    """Opens a `Progress` and closes it at the end of the block."""
    display = Progress(total, unit, done, alike=alike)
    try:
        yield display
    finally:
        display.close()


def format_duration(seconds: float) -> str:
    """Returns `1 h 05 min`, `2 min 10 s` or `7 s`."""
    rounded = round(seconds)
    if rounded >= 3600:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{rounded // 60} min {rounded % 60:02d} s" if rounded >= 60 else f"{rounded} s"


def format_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Returns rows, headings first, as text in aligned columns; `right` aligns the cells at the right, for numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
