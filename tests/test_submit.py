"""Commands as jobs of a real Ray head on this machine, which asks for a token; secrets stay where they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import submit
from pipeline.config import load_config
from pipeline.distributed import free_port
from pipeline.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from pipeline.submit import SubmitConfig

TOKEN = "planted-token-of-the-cluster-31415926"
SECRET = "planted-secret-of-this-machine-2718"
LIMIT_S = 120


def make_folder(folder: Path) -> Path:
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "weights").write_text("many bytes")
    (folder / "hello.txt").write_text("hello")
    return folder


@pytest.mark.parametrize("name", ["MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"])
def test_a_secret_is_not_sent(name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        submit.make_runtime_env(SubmitConfig(environment=[name]), {name: SECRET})
    assert SECRET not in str(caught.value)


def test_a_password_in_a_url_is_not_sent() -> None:
    uri = f"http://me:{SECRET}@tracker"
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        submit.make_runtime_env(SubmitConfig(environment=["MLFLOW_TRACKING_URI"]), {"MLFLOW_TRACKING_URI": uri})


def test_variables_are_taken_by_name(tmp_path: Path) -> None:
    config = SubmitConfig(environment=["HF_HOME"], working_dir=tmp_path)
    sent = submit.make_runtime_env(config, {"HF_HOME": "/models", "OTHER": "stays", "MY_TOKEN": SECRET})
    assert sent["env_vars"]["HF_HOME"] == "/models"
    assert "OTHER" not in sent["env_vars"] and SECRET not in json.dumps(sent)
    with pytest.raises(UserError, match="HF_HOME is not set"):
        submit.make_runtime_env(config, {})


def test_a_command_is_needed_and_a_dry_run_tells_no_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="COMMAND"):
        submit.main(["ray_job"])
    monkeypatch.setenv("PLACE", "a value")
    assert submit.main(["ray_job", "environment=[PLACE]", "--dry-run", "--", "pal", "train", "a b"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["entrypoint"] == "pal train 'a b'"
    assert "PLACE" in shown and "a value" not in shown


def test_the_shipped_cluster_is_on_this_machine() -> None:
    assert load_config(SubmitConfig, "ray_job").address.startswith("http://127.0.0.1:")


def test_no_cluster_is_one_line() -> None:
    done = pal_submit(f"http://127.0.0.1:{free_port()}", "--", "true")
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.splitlines()[-1].startswith("pal: address: no job server answers")


def pal_submit(address: str, *arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    process = start_submit(address, *arguments, token=token)
    out, err = process.communicate(timeout=LIMIT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_submit(address: str, *arguments: object, token: str = TOKEN) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.submit", "ray_job", f"address={address}", *map(str, arguments)],
        env={**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "MY_SECRET": SECRET, "PLACE": "here"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, dashboard = free_port(), free_port()
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with log.open("w") as file:
        head = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + LIMIT_S
        while not _answers(address):
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def _answers(address: str) -> bool:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_the_log_and_the_exit_code_come_back_and_no_secret_does(cluster: str, tmp_path: Path) -> None:
    folder, figures = make_folder(tmp_path / "sent"), tmp_path / "figures.json"
    script = f"cat hello.txt; ls; echo $PLACE; echo said {SECRET}; echo secret ${{MY_SECRET:-none}}; exit 3"
    done = pal_submit(
        cluster, f"working_dir={folder}", "environment=[PLACE]", "--json", figures, "--", "sh", "-c", script
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(figures.read_text())["status"] == "FAILED"
    lines = done.stdout.splitlines()
    assert "hellohello.txt" in done.stdout.replace("\n", "") and "runs" not in lines
    assert "here" in lines and "secret none" in lines and "said ***" in lines
    assert SECRET not in done.stdout + done.stderr and TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_a_job_and_lets_it_save(cluster: str, tmp_path: Path) -> None:
    folder, saved = make_folder(tmp_path / "sent"), tmp_path / "saved"
    # Ray's own patience is 3 s.
    script = f"trap 'sleep 6; touch {saved}; exit 75' TERM; echo started; while true; do sleep 0.2; done"
    job = start_submit(cluster, f"working_dir={folder}", "--stop-on-interrupt", "--", "sh", "-c", script)
    assert job.stdout is not None
    for line in job.stdout:
        if line == "started\n":
            break
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == EXIT_STOPPED, err
    assert saved.exists()


@pytest.mark.slow
def test_a_wrong_token_is_one_line(cluster: str) -> None:
    done = pal_submit(cluster, "--", "true", token="another-token-altogether")
    assert done.returncode == EXIT_USER_ERROR
    assert "does not accept our token" in done.stderr.splitlines()[-1]
