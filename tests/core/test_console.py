"""Log records by rank, progress without a terminal, durations and tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from pipeline.core import console
from pipeline.core.console import (
    Progress,
    RankFilter,
    configure_logging,
    format_duration,
    format_table,
    logger,
    markdown_table,
    progress,
)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    configure_logging()
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


class Records(logging.Handler):
    """Collects the messages of records."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize(("rank", "messages"), [(0, ["step 1", "slow disk", "lost"]), (1, ["slow disk", "lost"])])
def test_other_ranks_than_the_first_log_only_warnings_and_errors(rank: int, messages: list[str]) -> None:
    records = Records()
    records.addFilter(RankFilter(rank))
    configure_logging(records)
    logger.info("step %d", 1)
    logger.warning("slow disk")
    logger.error("lost")
    assert records.messages == messages


def test_records_go_to_stderr_as_it_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("ready")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "pal: ready\n")


def test_configuring_twice_shows_a_record_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()
    logger.info("once")
    assert capsys.readouterr().err == "pal: once\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `Progress` reads; a test sets it."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_progress_without_a_terminal_is_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(100, "clips", done=20) as display:
        clock[0] = console.PLAIN_EVERY_S - 1
        display.update(30)
        assert capsys.readouterr().err == "", "too early for a line"
        clock[0] = 24.0
        display.update(40, "1.0 clips/s")
        assert capsys.readouterr().err == "pal: 40/100 clips, 1.0 clips/s, 1 min 00 s left\n"
        clock[0] = 25.0
        display.update(41, force=True)
        assert capsys.readouterr().err.startswith("pal: 41/100 clips, ")


def test_the_time_left_does_not_count_the_start(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    display = Progress(100, "clips")
    for clock[0], done in ((30.0, 0), (300.0, 10), (310.0, 20)):
        display.update(done, force=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("clips, ")[2] for line in lines] == [
        "time left unknown",
        "time left unknown",
        "1 min 20 s left",
    ]


def test_units_with_a_start_of_their_own_are_counted_from_the_beginning(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    display = Progress(4, "trials", 1, alike=True)
    clock[0] = 60.0
    display.update(2, force=True)
    assert capsys.readouterr().err == "pal: 2/4 trials, 2 min 00 s left\n"


def test_advance_counts_units(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    display = Progress(4, "questions", alike=True)
    for clock[0] in (10.0, 20.0):
        display.advance()
    display.close()
    assert capsys.readouterr().err == "pal: 2/4 questions, 20 s left\n"


def test_the_remaining_time_is_unknown_until_something_is_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    display = Progress(4, "clips", done=1)
    clock[0] = 30.0
    display.update(1)
    assert capsys.readouterr().err == "pal: 1/4 clips, time left unknown\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (130, "2 min 10 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_columns_are_aligned() -> None:
    rows = [("name", "clips"), ("train", "12"), ("a", "345")]
    assert format_table(rows) == "name   clips\ntrain  12\na      345"
    assert format_table(rows, right=True) == " name  clips\ntrain     12\n    a    345"


def test_cells_of_markdown_keep_the_table_whole() -> None:
    table = markdown_table(("question", "n"), [("a|b\nc", "1")])
    assert table == "| question | n |\n| --- | --- |\n| a\\|b c | 1 |"
