"""What people read: log lines, progress, tables and durations.

Results of a command go to stdout by `print`. Everything that is said on the way is a log record of the logger `pal`,
shown on stderr as `pal: ...`. On the ranks of a job, `pipeline.launch.rank_process` sends these records to the console
of the command that started it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

logger = logging.getLogger("pal")
PLAIN_EVERY_S = 15.0  # between two progress lines where no terminal shows a bar


class RankFilter(logging.Filter):
    """Lets records of rank 0 pass, and of other ranks warnings and errors."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self._rank == 0 or record.levelno >= logging.WARNING


def configure_logging(handler: logging.Handler | None = None) -> None:
    """Sends the records of the logger `pal` to one handler, by default to stderr as `pal: ...`."""
    if handler is None:
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter("pal: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a record comes, not when logging was configured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class Progress:
    """Progress of long work on stderr: a bar on a terminal, otherwise a log line now and then.

    Args:
        total: units of work.
        unit: what is counted, in the plural ("clips").
        done: units that were finished before.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._total, self._unit = total, unit
        self._done = self._before = done
        self._start = self._last = time.monotonic()
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
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def update(self, done: int, note: str = "", *, force: bool = False) -> None:
        """Shows how much is done, and a note such as a rate beside it.

        Args:
            force: write a log line also if the last one was a moment ago.
        """
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=note)
            return
        now = time.monotonic()
        if not force and now - self._last < PLAIN_EVERY_S:
            return
        self._last = now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        remaining = f"{format_duration((self._total - done) / rate)} left" if rate > 0 else "time left unknown"
        logger.info(", ".join(filter(None, (f"{done}/{self._total} {self._unit}", note, remaining))))

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds to what is done."""
        self.update(self._done + count, note)

    def close(self) -> None:
        """Ends the bar; the last line stays on the terminal."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """A `Progress` that is closed at the end of the block."""
    shown = Progress(total, unit, done)
    try:
        yield shown
    finally:
        shown.close()


def format_duration(seconds: float) -> str:
    """`1 h 05 min`, `2 min 10 s` or `7 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def format_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Rows, headings first, with the cells of a column below each other; `right` aligns columns of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
