"""The whole loop on two ranks, several times in the same processes, in ways that must give the same curve."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.ranks import read_ranks
from pipeline.tracking.writer import read_metrics
from pipeline.training import checkpoint_dir
from pipeline.training.lr_schedule import lr_multiplier
from tests.helpers.jobs import train_in_process, write_experiment
from tests.helpers.ranks import run_on_ranks

STEPS = 4
BUDGET = ["train.micro_batch_size=4", "train.micro_batch_tokens=350"]  # two of the longest rows
SAME_CURVE = {
    "fixed": [],
    **{f"budget {policy}": [*BUDGET, f"train.zero={policy}"] for policy in ("zero0", "zero2", "zero3")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ways")
    checkpoints = {"every_steps": 1, "keep": 10}
    write_experiment(folder, steps=STEPS, learning_rate=1e-3, checkpoint=checkpoints)
    run_on_ranks(_train_all, 2, folder)
    return folder


def _train_all(folder: Path) -> None:
    constant = ["train.warmup_fraction=0", "train.final_learning_rate_fraction=1"]
    for way, settings in SAME_CURVE.items():
        _train(folder, way, *settings, *constant)
    length = seen_tokens(folder / "fixed")[2] + 1  # ends in the fourth step
    tokens = [*BUDGET, "train.steps=null", f"train.tokens={length}", "train.warmup_fraction=0.5"]
    _train(folder, "tokens", *tokens)
    _train(folder, "tokens again", *tokens)
    if read_ranks().is_main:
        for lost in checkpoint_dir.list_checkpoints(folder / "tokens again")[:-2]:
            shutil.rmtree(lost)
    _train(folder, "tokens again", *tokens)


def _train(folder: Path, way: str, *settings: str) -> None:
    train_in_process([load_config(ExperimentConfig, folder / "config.yaml", [f"output={folder / way}", *settings])])


def seen_tokens(output: Path) -> list[int]:
    steps = reversed(checkpoint_dir.list_checkpoints(output))
    return [int(checkpoint_dir.read_record(path).progress["seen_tokens"]) for path in steps]


def curve(output: Path) -> list[dict[str, Any]]:
    names = ("train/loss", "train/learning_rate/streams.matrices", "train/gradient_norm")
    return [{name: metrics[name] for name in names} for _, metrics in read_metrics(output)]


def test_micro_batches_of_varying_number_give_the_same_losses(folder: Path) -> None:
    expected = curve(folder / "fixed")
    assert len(expected) == STEPS
    for way in SAME_CURVE:
        for step, expected_step in zip(curve(folder / way), expected, strict=True):
            assert step["train/loss"] == pytest.approx(expected_step["train/loss"], abs=1e-6), way
            assert step["train/gradient_norm"] == pytest.approx(expected_step["train/gradient_norm"], rel=1e-5), way


def test_the_loss_is_recorded_by_task(folder: Path) -> None:
    for way in SAME_CURVE:
        for _, metrics in read_metrics(folder / way):
            what, count = (metrics[f"train/loss/{task}"] for task in ("what", "count"))
            assert min(what, count) < metrics["train/loss"] < max(what, count)


def test_a_run_whose_length_is_set_in_tokens(folder: Path) -> None:
    """The rate is a function of the fraction of tokens seen."""
    seen, peak = seen_tokens(folder / "tokens"), 1e-3
    assert seen == seen_tokens(folder / "fixed") and len(seen) == STEPS
    rates = [step["train/learning_rate/streams.matrices"] for step in curve(folder / "tokens")]
    assert rates == [peak * lr_multiplier(n, seen[2] + 1, 0.5, 0.1) for n in seen]
    assert rates[-1] == pytest.approx(0.1 * peak) and max(rates) > 0.5 * peak


def test_a_run_in_tokens_resumes_from_a_checkpoint(folder: Path) -> None:
    assert curve(folder / "tokens again") == curve(folder / "tokens")
    weights = "model/model.safetensors"
    assert (folder / "tokens again" / weights).read_bytes() == (folder / "tokens" / weights).read_bytes()
