"""Faults of a real job: what the user is told, and whether the run goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from jobs import end_of, start_job, wait_for_step, write_experiment

from pipeline import checkpoint, launch, tracking
from pipeline.errors import EXIT_FAILURE


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("faults"), checkpoint={"every_steps": 2, "keep": 2})


def process_of(rank: int, output: Path) -> int:
    return json.loads((output / launch.RANKS / f"rank-{rank}.json").read_text())["pid"]


def test_a_killed_rank_is_named_and_the_run_goes_on(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = start_job(config, f"output={output}", "--nproc", 2, "--max-restarts", 1)
    wait_for_step(job, output, 5)
    os.kill(process_of(1, output), signal.SIGKILL)
    code, out, err = end_of(job, output)
    assert code == 0, err
    assert "rank 1 died" in err and "restart 1 of 1" in err and "resumed from" in out
    assert checkpoint.list_checkpoints(output)[0].name == "step-000012"


@pytest.mark.slow
def test_a_hung_rank_ends_the_job_and_is_named(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = start_job(config, f"output={output}", "--nproc", 2, "train.collective_timeout_s=5")
    wait_for_step(job, output, 5)
    os.kill(process_of(1, output), signal.SIGSTOP)
    code, _, err = end_of(job, output)
    assert code == EXIT_FAILURE and "rank 1 died or hung" in err and "after step" in err


@pytest.mark.slow
def test_gradients_that_stay_infinite_end_the_run_with_their_batches(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ("train.learning_rate=1e30", "train.gradient_clipping=0", "train.max_skipped_steps=3")
    code, out, err = end_of(start_job(config, f"output={output}", *settings), output)
    assert code == EXIT_FAILURE and "3 steps in a row" in err
    assert out.count("skipped: the gradient is not finite") == 3
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [len(rank["question_ids"]) for rank in skipped[-1]["by_rank"]] == [8]
    assert tracking.read_metrics(output)[-1][1]["train/skipped_steps"] == 3
