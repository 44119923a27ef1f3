"""An address that no Ray cluster answers is named at once; the current folder stays out of the workers' modules."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core import ray_connection
from pipeline.core.errors import UserError


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "[127.0.0.1]:{port}"])
def test_an_address_where_nothing_listens_is_named(address: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = address.format(port=probe.getsockname()[1])
        with pytest.raises(UserError, match=r"no cluster answers at .*Connection refused"):
            ray_connection.require_answer("RAY_ADDRESS", address)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:ray", "host:99999999", "ray://host"])
def test_a_text_that_is_no_address_is_named(address: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        ray_connection.require_answer("RAY_ADDRESS", address)


def test_a_server_that_accepts_and_stays_silent_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connection, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(UserError, match="no cluster answers"):
            ray_connection.require_answer("--ray", f"127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - started < 5


def test_another_program_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="another program"):
            ray_connection.require_answer("--ray", f"127.0.0.1:{server.getsockname()[1]}")


def test_a_cluster_that_is_recorded_and_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(UserError, match=r"'auto' \(127.0.0.1:1\)"):
        ray_connection.require_answer("--ray", "auto")


def test_a_command_keeps_the_current_folder_out_of_its_child_processes(tmp_path: Path) -> None:
    for name in ("pipeline", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the current folder was imported')\n")
    child = "import subprocess, sys; r = subprocess.run([sys.executable, '-c', 'import pipeline, random']); "
    program = "from pipeline.core.errors import run_command\n"
    program += f"def main(_):\n    {child}return r.returncode\n\nraise SystemExit(run_command(main, []))\n"
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_do_not_import_modules_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit('the current folder was imported')\n")
    program = (
        "import ray; from pipeline.core import ray_connection\n"
        "ray_connection.connect('Ray', 'local', include_dashboard=False, num_cpus=1)\n"
        "@ray.remote\ndef module():\n    import colorsys\n    return colorsys.__file__\n"
        "print(ray.get(module.remote()))\n"
    )
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and str(tmp_path) not in done.stdout, done.stdout + done.stderr
    assert "colorsys.py" in done.stdout
