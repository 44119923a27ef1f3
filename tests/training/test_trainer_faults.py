"""Faults that end a run: no gradient, gradients that are not finite, ranks that differ."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.errors import UserError
from pipeline.core.ranks import read_ranks
from pipeline.engine import init_process_group, require_same_everywhere
from pipeline.tracking import writer
from tests.helpers.jobs import write_experiment
from tests.helpers.log_lines import log_lines
from tests.helpers.ranks import run_on_ranks


def error_of(config: Path, *settings: str) -> str:
    from pipeline.training.trainer import Trainer

    experiment = load_config(ExperimentConfig, config, settings)
    trainer = Trainer(experiment, read_ranks(), threading.Event())
    with pytest.raises(RuntimeError) as error:
        trainer.fit()
    trainer.engine.close()
    return str(error.value)


def cut_off_the_audio() -> None:
    """Removes the gradient of the audio, as reentrant checkpointing does for tensors passed by keyword."""
    from pipeline.model import base

    whole = base.run_connectors

    def cut(*arguments: Any) -> Any:
        audio = whole(*arguments)
        return dataclasses.replace(audio, tokens=[tokens * 0 for tokens in audio.tokens])

    base.run_connectors = cut


def meet_faults(config: Path, folder: Path) -> dict[str, Any]:
    ranks = read_ranks()
    init_process_group(ranks, 120)
    results: dict[str, Any] = {}
    try:
        require_same_everywhere({"train.seed": 1, "torch": "2", "only on rank 1": ranks.rank or None})
        require_same_everywhere({"train.seed": ranks.rank})
    except UserError as error:
        results["other settings"] = str(error)
    ruin = ("train.learning_rate=1e30", "train.gradient_clipping=0", "train.max_skipped_steps=3")
    with log_lines() as results["log"]:
        results["not finite"] = error_of(config, *ruin, f"output={folder / 'ruined'}")
    cut_off_the_audio()
    results["cut off"] = error_of(config, "model.integration=plits", f"output={folder / 'cut'}")
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(meet_faults, 2, write_experiment(folder), folder)


def test_ranks_that_were_started_differently_are_refused(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["other settings"].startswith("rank 1: has only on rank 1 = 1 and rank 0 has None;")


def test_gradients_that_stay_infinite_end_the_run_with_their_batches(
    results: list[dict[str, Any]], folder: Path
) -> None:
    assert all(rank["not finite"].startswith("3 steps in a row had a gradient that is not finite") for rank in results)
    assert sum("skipped: the gradient is not finite" in line for line in results[0]["log"]) == 3
    assert not any("skipped" in line for line in results[1]["log"])
    records = (folder / "ruined" / "skipped.jsonl").read_text().splitlines()
    assert [len(rank["question_ids"]) for rank in json.loads(records[-1])["by_rank"]] == [4, 4]
    assert writer.read_metrics(folder / "ruined")[-1][1]["train/skipped_steps"] == 3


def test_a_side_that_no_gradient_reaches_ends_the_run_at_once(results: list[dict[str, Any]], folder: Path) -> None:
    assert all(rank["cut off"].startswith("no gradient reaches streams, which is trained") for rank in results)
    assert not list((folder / "cut").glob("step-*"))
