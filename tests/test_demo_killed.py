"""The whole demo on real files, killed while it trains: finished stages are kept, and the others resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.demo import VARIANTS

SETTINGS = ("train.steps=12", "train.global_batch_size=12", "train.micro_batch_size=1", "train.log_every_steps=2")
CHECKPOINTS = ("train.checkpoint.every_steps=4", "train.checkpoint.keep=3")
FINISHED_BEFORE_THE_KILL = ("corpus", "features train", "features test", "language model", "train plits")


def start(out: Path, results: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.demo", "--out", str(out), "--clips", "60", "--json", str(results)]
    with log.open("w") as stream:
        return subprocess.Popen(
            [*command, *SETTINGS, *CHECKPOINTS],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_demo_killed_while_it_trains_resumes_and_compares_three_models(tmp_path: Path) -> None:
    out, results, log = tmp_path / "demo", tmp_path / "demo.json", tmp_path / "log"
    first = start(out, results, log)
    try:
        while not list(out.glob("lal/step-*/COMPLETE.json")):
            assert first.poll() is None, log.read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)  # its training process keeps running, because nothing signals it
    finally:
        first.kill()
        first.wait()

    second = start(out, results, log)
    assert second.wait(timeout=1200) == 0, log.read_text()
    text = log.read_text()
    assert [name for name in FINISHED_BEFORE_THE_KILL if f"{name:16} already finished" not in text] == []
    assert "train lal        already finished" not in text
    assert "resumed from" in (out / "stages" / "train_lal.log").read_text()

    comparison = json.loads(results.read_text())
    assert tuple(comparison["variants"]) == VARIANTS
    for figures in comparison["variants"].values():
        assert set(figures["accuracy_by_domain"]) == {"sound", "music", "speech"}
        assert 0 <= figures["swapped_audio_accuracy"] <= 1
        assert figures["final_loss"] > 0
        assert figures["samples_per_s"] > 0
        assert figures["peak_memory_gib"] > 0
    assert comparison["wall_s"] > 0
    assert {file.suffix for file in (out / "report").iterdir()} == {".md", ".csv", ".png"}

    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted([*VARIANTS, "report"]), (
        "a resumed run is the same MLflow run"
    )
    assert all(run.info.status == "FINISHED" for run in runs)
    losses = {
        run.info.run_name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
        for run in runs
    }
    assert {step for step, _ in losses["lal"]} == {step for step, _ in losses["plits"]} == {1, 2, 4, 6, 8, 10, 12}
    for name in VARIANTS:
        predictions = [json.loads(line) for line in (out / name / "predictions.jsonl").read_text().splitlines()]
        assert {line["audio"] for line in predictions} == {"own", "swapped"}
    question_ids = [
        [line["question_id"] for line in map(json.loads, (out / name / "predictions.jsonl").read_text().splitlines())]
        for name in VARIANTS
    ]
    assert question_ids[0] == question_ids[1] == question_ids[2]
