"""Log lines of ranks reach the console of the command that started the job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.core.console import logger
from pipeline.launch import rank_process


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.mark.parametrize("has_parent", [True, False])
@pytest.mark.parametrize(("rank", "expected"), [(0, ["100% done", "careful", "broken"]), (1, ["careful", "broken"])])
def test_rank_0_logs_everything_and_other_ranks_only_warnings_and_errors(
    has_parent: bool,
    rank: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(rank_process.HAS_PARENT, raising=False)
    if has_parent:
        monkeypatch.setenv(rank_process.HAS_PARENT, "1")
    rank_process.configure_rank_logging(rank)
    logger.info("100% done")
    logger.warning("careful")
    logger.error("broken")
    output = capsys.readouterr()
    marked = [f"{rank_process.CONSOLE}{line}" for line in expected]
    unmarked = [f"pal: {line}" for line in expected]
    assert output.out.splitlines() == (marked if has_parent else [])
    assert output.err.splitlines() == ([] if has_parent else unmarked)
