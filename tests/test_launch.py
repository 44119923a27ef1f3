"""What the parent of a job shows and keeps of what its ranks say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import launch
from pipeline.errors import EXIT_FAILURE

SECRET = "correct-horse-battery"


def supervise(output: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> tuple[int, str]:
    """With a script in the place of the launcher."""
    real = subprocess.Popen

    def popen(_: object, **settings: Any) -> subprocess.Popen[str]:
        return real([sys.executable, "-c", script], **settings)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return launch.supervise(["config"], output, nproc=1, hostfile=None, on_gpu=False)


def test_no_secret_of_the_environment_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    script = "import os; print(os.environ); print('pal> ', os.environ['HF_TOKEN']); raise SystemExit(3)"
    code, message = supervise(tmp_path, monkeypatch, script)
    assert code == EXIT_FAILURE and "HF_TOKEN" in message
    log = (tmp_path / launch.LOG).read_text()
    assert log.count("***") == 4 and SECRET not in log + message + capsys.readouterr().out


def test_a_full_disk_costs_the_log_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / launch.LOG).symlink_to("/dev/full")
    assert supervise(tmp_path, monkeypatch, "print('pal> step 1\\n' * 3)") == (0, "")
    assert capsys.readouterr().out == "step 1\n" * 3
