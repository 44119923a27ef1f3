"""The team's MLflow server as shipped: on localhost, behind passwords; training logs no secret to it."""

from __future__ import annotations

import base64
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
from typing import Any

import psutil
import pytest

from pipeline.core.ranks import free_port
from pipeline.training.run_dir import read_run
from tests.helpers.jobs import LIMIT_S, end_of, start_job, write_experiment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[2] / "cluster" / "mlflow" / "server.sh"
PASSWORDS = {"admin": "planted-admin-27182", "trainer": "planted-trainer-31415", "guest": "planted-guest-16180"}
KEY, TOKEN = "planted-key-14142-of-the-server", "planted-token-17320"


class Server:
    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.uri, self.process, self._port = folder, f"http://127.0.0.1:{port}", process, port

    def call(self, path: str, user: str | None = None, **values: Any) -> tuple[int, dict[str, Any]]:
        """Returns status and answer of a request as `user`; a POST if there are values."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/{path}", json.dumps(values).encode() if values else None
        )
        request.add_header("Content-Type", "application/json")
        if user is not None:
            request.add_header(
                "Authorization", "Basic " + base64.b64encode(f"{user}:{PASSWORDS[user]}".encode()).decode()
            )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, {}

    def listening(self) -> set[str]:
        """Returns the addresses on which processes of the server listen."""
        parent = psutil.Process(self.process.pid)
        sockets = [
            s for p in (parent, *parent.children(recursive=True)) for s in p.net_connections() if s.status == "LISTEN"
        ]
        return {f"{s.laddr.ip}:{s.laddr.port}" for s in sockets}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    settings = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": KEY,
        "PORT": str(port),
        "WORKERS": "1",
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [SCRIPT, folder / "store"],
            env={**os.environ, **settings, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server = Server(folder, port, process)
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-3000:]
            try:
                server.call("experiments/get?experiment_id=0")
                break
            except OSError:
                time.sleep(0.5)
        for user in ("trainer", "guest"):
            assert server.call("users/create", "admin", username=user, password=PASSWORDS[user])[0] == 200
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_server_listens_on_localhost_alone(server: Server) -> None:
    assert server.listening() == {server.uri.removeprefix("http://")}


def test_nobody_has_access_without_a_password(server: Server) -> None:
    assert server.call("experiments/get?experiment_id=0")[0] == 401
    assert server.call("users/create", username="me", password="whatever-I-like")[0] == 401
    assert server.call("users/create", "guest", username="me", password="whatever-I-like")[0] == 403
    assert server.call("experiments/get?experiment_id=0", "guest")[0] == 200


def test_only_the_owner_can_read_the_store(server: Server) -> None:
    assert (server.folder / "store").stat().st_mode & 0o077 == 0


def test_training_logs_a_run_that_others_can_read_without_any_secret(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["trainer"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    experiment = write_experiment(tmp_path, steps=2)
    output = tmp_path / "run"
    code, out, err = end_of(start_job(experiment, f"tracking.uri={server.uri}"), output)
    assert code == 0, err
    record = read_run(output)
    assert record is not None
    status, answer = server.call(f"runs/get?run_id={record.run_id}", "guest")
    assert status == 200 and answer["run"]["info"]["status"] == "FINISHED"
    assert {"train/loss", "validation/loss"} <= {metric["key"] for metric in answer["run"]["data"]["metrics"]}
    change = {"run_id": record.run_id, "key": "mine", "value": "now"}
    assert server.call("runs/set-tag", "guest", **change)[0] == 403
    assert server.call("runs/set-tag", "trainer", **change)[0] == 200

    texts = [out, err, json.dumps(answer), (server.folder / "server.log").read_text()]
    files = [file for folder in (output, server.folder / "store") for file in folder.rglob("*") if file.is_file()]
    assert output / "metrics.jsonl" in files and len(files) > 10
    texts += [file.read_bytes().decode(errors="replace") for file in files]
    for secret in (*PASSWORDS.values(), KEY, TOKEN):
        assert not [text for text in texts if secret in text]
