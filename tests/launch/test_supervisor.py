"""The parent of a job: what it shows and logs of the output of its ranks, and how it requests that they stop."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE
from pipeline.launch import rank_process, supervisor

SECRET = "correct-horse-battery"


@pytest.fixture
def restored_logging() -> Iterator[None]:
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def supervise(
    output: Path, monkeypatch: pytest.MonkeyPatch, script: str, hostfile: Path | None = None
) -> tuple[int, str]:
    """Calls `supervise` with a script in place of the launcher."""
    real = subprocess.Popen

    def popen(_: object, **settings: Any) -> subprocess.Popen[str]:
        return real([sys.executable, "-c", script], **settings)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return supervisor.supervise(["config"], output, supervisor.Placement(1, False, hostfile))


def test_no_secret_of_the_environment_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    script = "import os; print(os.environ); print('pal> ', os.environ['HF_TOKEN']); raise SystemExit(3)"
    code, message = supervise(tmp_path, monkeypatch, script)
    assert code == EXIT_FAILURE and "HF_TOKEN" in message
    log = (tmp_path / supervisor.LOG).read_text()
    assert log.count("***") == 4 and SECRET not in log + message + capsys.readouterr().out


def test_no_secret_that_the_launcher_reads_from_its_file_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text(f"NCCL_DEBUG=WARN\nMLFLOW_TRACKING_PASSWORD={SECRET}\n")
    script = "from pathlib import Path; print(Path('~/.deepspeed_env').expanduser().read_text())"
    assert supervise(tmp_path, monkeypatch, script) == (0, "")
    assert "NCCL_DEBUG=WARN\nMLFLOW_TRACKING_PASSWORD=***" in (tmp_path / supervisor.LOG).read_text()


def test_stop_requests_reach_ranks_on_other_hosts_through_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_process, "STOP_REQUEST_POLL_S", 0.01)
    monkeypatch.setenv("PYTHON_PAL_HAS_PARENT", "1")
    ended, stopped = threading.Event(), threading.Event()
    monkeypatch.setattr(rank_process.os, "_exit", lambda code: ended.set() if code == EXIT_FAILURE else None)
    supervisor._request(tmp_path, "")
    rank_process.watch_stop_request(tmp_path, stopped.set)
    assert not stopped.wait(0.1)
    supervisor._request(tmp_path, rank_process.SAVE)
    assert stopped.wait(10) and not ended.is_set()
    supervisor._request(tmp_path, rank_process.END)
    assert ended.wait(10)


def test_a_job_on_several_hosts_ends_soon_after_a_rank_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host hangs, and pdsh would wait for it."""
    monkeypatch.setattr(rank_process, "STOP_REQUEST_POLL_S", 0.01)
    monkeypatch.setattr(supervisor, "_GRACE_PERIOD_S", 0.1)
    script = (
        "from pathlib import Path; from pipeline.launch import rank_process; import time; "
        f"rank_process.record_exit(Path({str(tmp_path)!r}), 1, 7, 1, 'no memory'); time.sleep(60)"
    )
    code, message = supervise(tmp_path, monkeypatch, script, hostfile=tmp_path / "hostfile")
    assert code == EXIT_FAILURE and message.startswith("rank 1 failed at step 7: no memory")
    assert (tmp_path / rank_process.STOP_REQUEST).read_text() == rank_process.END


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_log_to_the_console_of_their_parent_or_to_stderr(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_logging: None
) -> None:
    monkeypatch.delenv(rank_process.HAS_PARENT, raising=False)
    rank_process.configure_rank_logging(rank)
    logger.info("step 1")
    logger.warning("slow disk")
    info = "pal: step 1\n" if rank == 0 else ""
    assert capsys.readouterr() == ("", f"{info}pal: slow disk\n")
    monkeypatch.setenv(rank_process.HAS_PARENT, "1")
    rank_process.configure_rank_logging(rank)
    logger.info("step 1")
    logger.warning("slow disk")
    info = "pal> step 1\n" if rank == 0 else ""
    assert capsys.readouterr() == (f"{info}pal> slow disk\n", "")


def test_a_full_disk_costs_the_log_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / supervisor.LOG).symlink_to("/dev/full")
    assert supervise(tmp_path, monkeypatch, "print('pal> step 1\\n' * 3)") == (0, "")
    assert capsys.readouterr().out == "step 1\n" * 3
