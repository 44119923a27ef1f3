"""`pal train` on two ranks under the real launcher: it learns, and stops and kills leave its curve unchanged."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrackingConfig
from pipeline.core.errors import EXIT_STOPPED
from pipeline.core.ranks import free_port
from pipeline.tracking import writer
from pipeline.training import checkpoint_dir, run_dir
from tests.helpers.jobs import end_of, start_job, wait_for_step, write_experiment

KEYS = {
    "steps",
    "final_loss",
    "samples_per_s",
    "text_tokens_per_s",
    "audio_s_per_s",
    "peak_memory_gib",
    "data_wait_fraction",
    "run_id",
    "checkpoint",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_experiment(folder)
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """Returns the output of a run that nothing disturbed."""
    output = folder / "straight"
    job = start_job(folder / "config.yaml", f"output={output}", "--nproc", 2, "--json", folder / "figures.json")
    code, out, err = end_of(job, output)
    assert code == 0, err
    assert "step     12/12" in out and "validation loss" in out
    return output


def curve(output: Path) -> dict[int, tuple[float, float, float | None]]:
    return {
        step: (metrics["train/loss"], metrics["train/gradient_norm"], metrics.get("validation/loss"))
        for step, metrics in writer.read_metrics(output)
    }


def mlflow_run(output: Path) -> Any:
    from mlflow import MlflowClient

    run = run_dir.read_run(output)
    assert run is not None and run.run_id is not None
    return MlflowClient(writer.tracking_uri(TrackingConfig(), output)).get_run(run.run_id)


def test_a_run_learns_and_leaves_figures_checkpoints_and_an_mlflow_run(folder: Path, straight: Path) -> None:
    losses = [loss for loss, _, _ in curve(straight).values()]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    figures = json.loads((folder / "figures.json").read_text())
    assert figures == json.loads((straight / "train.json").read_text()) and figures.keys() >= KEYS
    assert figures["steps"] == 12 and 0 <= figures["data_wait_fraction"] < 1
    assert [p.name for p in checkpoint_dir.list_checkpoints(straight)] == ["step-000012", "step-000008"]
    assert checkpoint_dir.verify(straight / "step-000012").data["packed_examples"] == 96
    run = mlflow_run(straight)
    assert run.info.status == "FINISHED" and run.info.run_id == figures["run_id"]
    assert run.data.params["train.zero"] == "zero2" and run.data.params["resolved.audio_layers"] == "[[0], []]"
    assert run.data.metrics["final_loss"] == figures["final_loss"]


def test_a_run_that_was_stopped_killed_and_resumed_is_the_same_run(folder: Path, straight: Path) -> None:
    output = folder / "disturbed"
    command = (folder / "config.yaml", f"output={output}", "--nproc", 2)
    shared_memory = set(Path("/dev/shm").glob("deepspeed_*"))

    job = start_job(*command)
    wait_for_step(job, output, 2)
    job.send_signal(signal.SIGTERM)
    code, _, err = end_of(job, output)
    assert code == EXIT_STOPPED and "rerun the same command" in err
    assert mlflow_run(output).info.status == "KILLED"

    job = start_job(*command)
    wait_for_step(job, output, 7)
    job.kill()  # only the parent: its ranks notice, and release the folder
    end_of(job, output)
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= shared_memory, "a killed rank cannot remove it"

    code, out, err = end_of(start_job(*command), output)
    assert code == 0, err
    assert "resumed from" in out
    assert curve(output) == curve(straight)
    weights = "model/model.safetensors"
    assert (output / weights).read_bytes() == (straight / weights).read_bytes()
    run = mlflow_run(output)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == curve(straight)[12][0]


def test_a_rank_that_slurm_or_torchrun_started_saves_on_a_signal(folder: Path) -> None:
    output = folder / "signalled"
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    job = start_job(folder / "config.yaml", f"output={output}", **group, MASTER_PORT=free_port())
    wait_for_step(job, output, 2)
    job.send_signal(signal.SIGUSR1)
    code, out, err = end_of(job, output)
    assert code == EXIT_STOPPED, out + err
    last = max(curve(output))
    assert 2 <= last < 12 and checkpoint_dir.list_checkpoints(output)[0].name == f"step-{last:06d}"


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_only_logs_that(folder: Path, straight: Path) -> None:
    recorded = curve(straight)
    job = start_job(folder / "config.yaml", f"output={straight}", "--nproc", 2)
    code, out, err = end_of(job, straight)
    assert code == 0, err
    assert "at step 12" in out and curve(straight) == recorded
