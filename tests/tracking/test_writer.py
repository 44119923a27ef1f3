"""Records reach MLflow when it answers and stay on disk when it does not; training never waits."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrackingConfig
from pipeline.tracking import writer
from pipeline.tracking.shipper import FOLDERS
from pipeline.tracking.writer import RunDescription, Tracker


@pytest.fixture
def ids() -> list[str]:
    return []


def start(output: Path, ids: list[str], config: TrackingConfig | None = None, run_id: str | None = None) -> Tracker:
    return Tracker(
        config or TrackingConfig(experiment="e"),
        output,
        run_id=run_id,
        description=RunDescription({"train.seed": 0}, {"git": "abc"}, {"config.yaml": "a: 1\n"}),
        on_run_id=ids.append,
    )


def client(output: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(writer.tracking_uri(TrackingConfig(), output))


def history(output: Path, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(output).get_metric_history(run_id, key)]


def test_a_run_is_recorded_and_resumed(tmp_path: Path, ids: list[str]) -> None:
    output = tmp_path / "run"
    tracker = start(output, ids)
    for step in (1, 2):
        tracker.log(step, {"train/loss": 1.0 / step, "train/nothing": float("nan")})
    assert tracker.close("KILLED")
    run = client(output).get_run(ids[0])
    assert run.info.status == "KILLED" and run.info.run_name == "run"
    assert run.data.params == {"train.seed": "0"} and run.data.tags["git"] == "abc"
    assert [a.path for a in client(output).list_artifacts(ids[0])] == ["config.yaml"]

    tracker = start(output, ids, run_id=ids[0])
    tracker.log(3, {"train/loss": 0.25})
    assert tracker.close("FINISHED")
    assert ids == [ids[0]] * 2
    assert history(output, ids[0]) == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert client(output).get_run(ids[0]).info.status == "FINISHED"
    assert not (tmp_path / "mlruns").exists() and (tmp_path / "mlartifacts").is_dir()


def test_a_dead_server_neither_stops_nor_delays_training(
    tmp_path: Path, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts connections and never answers, the worst case for a client that waits."""
    with socket.socket() as silent, monkeypatch.context() as patch:
        patch.setattr(writer, "EXIT_WAIT_S", 0.5)
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", experiment="e")
        begin = time.monotonic()
        tracker = start(tmp_path / "run", ids, config)
        for step in range(100):
            tracker.log(step, {"train/loss": 1.0})
        assert time.monotonic() - begin < 1.0
        assert not tracker.close("FINISHED")
        assert time.monotonic() - begin < 5.0
    assert ids == []
    # Nothing is lost: the next start, with a server that answers, sends it.
    tracker = start(tmp_path / "run", ids)
    assert tracker.close("FINISHED")
    assert len(history(tmp_path / "run", ids[0])) == 100


def test_a_refused_connection_is_reported_and_survived(tmp_path: Path, ids: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tracker = start(tmp_path / "run", ids, TrackingConfig(uri=f"http://127.0.0.1:{port}"))
    tracker.log(1, {"train/loss": 1.0})
    assert not tracker.close("FINISHED")
    assert tracker.failure
    assert len((tmp_path / "run" / writer.METRICS).read_text().splitlines()) == 1


def test_a_record_truncated_by_a_crash_is_not_sent(tmp_path: Path, ids: list[str]) -> None:
    output = tmp_path / "run"
    tracker = start(output, ids)
    tracker.log(1, {"train/loss": 1.0})
    assert tracker.close("KILLED")
    with (output / writer.METRICS).open("a") as file:
        file.write('{"step": 2, "ti')
    tracker = start(output, ids, run_id=ids[0])
    tracker.log(2, {"train/loss": 0.5})
    assert tracker.close("FINISHED")
    assert history(output, ids[0]) == [(1, 1.0), (2, 0.5)]


def test_another_process_ends_the_run_of_a_dead_one(tmp_path: Path, ids: list[str]) -> None:
    output = tmp_path / "run"
    tracker = start(output, ids)
    assert tracker.close("KILLED")
    with (output / writer.METRICS).open("a") as file:
        file.write(json.dumps({"step": 7, "time": 1.0, "metrics": {"train/loss": 3.0}}) + "\n")
    writer.end_run(TrackingConfig(experiment="e"), output, ids[0], "FAILED")
    assert client(output).get_run(ids[0]).info.status == "FAILED"
    assert history(output, ids[0]) == [(7, 3.0)]


def test_a_server_that_comes_back_gets_every_record(
    tmp_path: Path, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def dead(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(writer, "SHIP_EVERY_S", 0.01)
    output = tmp_path / "run"
    tracker = start(output, ids)
    tracker.log(1, {"train/loss": 1.0})
    deadline = time.monotonic() + 60
    while not ids or not history(output, ids[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", dead)
        tracker.log(2, {"train/loss": 0.5})
        assert not tracker.close("FINISHED")
        assert tracker.failure is not None and "(ConnectionError: the server is gone)" in tracker.failure
    assert history(output, ids[0]) == [(1, 1.0)]
    assert start(output, ids, run_id=ids[0]).close("FINISHED")
    assert history(output, ids[0]) == [(1, 1.0), (2, 0.5)]


def test_a_full_disk_delays_records_and_loses_none(tmp_path: Path, ids: list[str]) -> None:
    class Full:
        """Accepts some bytes, then none, then all."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, [10, OSError(28, "No space left on device")]

        def write(self, content: bytes) -> int:
            room = self.room.pop(0) if self.room else len(content)
            if isinstance(room, OSError):
                raise room
            return self.file.write(content[:room])

        def close(self) -> None:
            self.file.close()

    tracker = start(tmp_path / "run", ids)
    tracker._file = Full(tracker._file)  # type: ignore[assignment]
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": float(step)})
    assert tracker.close("FINISHED")
    assert [step for step, _ in writer.read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_folders_are_stored_once_and_removed_ones_are_skipped(tmp_path: Path, ids: list[str]) -> None:
    output = tmp_path / "run"
    for name in ("step-1", "step-2"):
        (output / name / "engine").mkdir(parents=True)
        (output / name / "engine" / "weights").write_bytes(name.encode())
    for _ in range(2):
        tracker = start(output, ids, run_id=ids[0] if ids else None)
        tracker.log_folders([output / "step-2", output / "step-1", output / "removed"])
        assert tracker.close("FINISHED") and tracker.uploading is None
        (output / "step-2" / "engine" / "later").touch()  # not sent: what is stored is not stored again
    stored = [a.path for a in client(output).list_artifacts(ids[0], FOLDERS)]
    assert stored == ["checkpoints/step-1", "checkpoints/step-2"]
    assert [a.path for a in client(output).list_artifacts(ids[0], "checkpoints/step-2/engine")] == [
        "checkpoints/step-2/engine/weights"
    ]


def test_machine_metrics_are_recorded_with_the_steps(tmp_path: Path, ids: list[str]) -> None:
    output = tmp_path / "run"
    tracker = start(output, ids)
    step, deadline = 0, time.monotonic() + 30
    while "system/cpu_utilization_percentage" not in (writer.read_metrics(output) or [(0, {})])[-1][1]:
        assert time.monotonic() < deadline
        step += 1
        tracker.log(step, {"train/loss": 1.0})
        time.sleep(0.2)
    assert tracker.close("FINISHED")
    ((_, used),) = history(output, ids[0], "system/system_memory_usage_percentage")[-1:]
    assert 0 < used < 100
