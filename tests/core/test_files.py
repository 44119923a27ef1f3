"""Atomic writes, and one lock between two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write, file_lock, lock_folder

HOLD = """
import sys
from pathlib import Path
from pipeline.core.files import lock_folder

with lock_folder(Path(sys.argv[1]), ".lock"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    atomic_write(path, b"first, longer")
    atomic_write(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    atomic_write(path, b"previous")

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, b"next")
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_held_by_one_process_which_the_message_names(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError) as error, lock_folder(tmp_path, ".lock"):
        pass
    assert str(error.value).startswith(f"{tmp_path}: is in use by process {holder.pid} on {os.uname().nodename} since")
    with pytest.raises(TimeoutError), file_lock(tmp_path / ".lock", timeout_s=0.1):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path, ".lock", timeout_s=10):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock.holder").read_text()


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the block"), lock_folder(tmp_path / "new", ".lock"):
        raise RuntimeError("in the block")
    with lock_folder(tmp_path / "new", ".lock"):
        assert (tmp_path / "new" / ".lock").exists()
