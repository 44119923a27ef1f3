"""Forty undisturbed steps against the same steps killed three times at random and resumed: every loss, every tensor,
the order of all samples. In one job with two stages, so that the kills fall on both sides of their boundary and on
it."""

from __future__ import annotations

import json
import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pipeline.tracking import writer
from pipeline.training import checkpoint_dir
from tests.helpers.jobs import end_of, start_job, wait_for_step, write_experiment

STEPS = {"first": 16, "second": 24}
FOLDERS = {"first": "01-first", "second": "02-second"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_experiment(tmp_path_factory.mktemp("identity"), checkpoint={"every_steps": 3, "keep": 2})
    values = yaml.safe_load(file.read_text())
    values["train"]["trainable"] = "connector"
    values["stages"] = {
        "first": {"data": {"tasks": ["what"]}, "train": {"steps": STEPS["first"]}},
        "second": {"train": {"steps": STEPS["second"], "trainable": "all", "learning_rate": 1e-3}},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def state_of(output: Path) -> dict[str, object]:
    """Returns everything that must not depend on how often a job was killed."""
    state: dict[str, object] = {}
    for stage, folder in FOLDERS.items():
        records = writer.read_metrics(output / folder)
        names = ("train/loss", "train/gradient_norm", "validation/loss", "train/loss/what")
        state[f"{stage} curve"] = [(step, [metrics.get(name) for name in names]) for step, metrics in records]
        newest = checkpoint_dir.read_record(checkpoint_dir.list_checkpoints(output / folder)[0])
        state[f"{stage} order"] = newest.data
        state[f"{stage} tensors"] = newest.checksums
        state[f"{stage} model"] = (output / folder / "model" / "model.safetensors").read_bytes()
    return state


def run_and_kill(config: Path, output: Path, settings: list[str], kills: list[tuple[str, int]]) -> None:
    command = (config, f"output={output}", "--nproc", 2, *settings)
    for stage, step in kills:
        job = start_job(*command)
        wait_for_step(job, output / FOLDERS[stage], step)
        for rank in sorted((output / "ranks").glob("rank-*.json")):
            _kill(json.loads(rank.read_text())["pid"])
        job.kill()
        end_of(job, output)
    code, _, err = end_of(start_job(*command), output)
    assert code == 0, err


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", ["zero1", "zero2", "zero3"])
def test_three_kills_leave_no_trace(policy: str, config: Path) -> None:
    settings = [f"train.zero={policy}"]
    straight, disturbed = config.parent / f"{policy}-straight", config.parent / f"{policy}-disturbed"
    run_and_kill(config, straight, settings, [])
    # At reproducible random steps: in the first stage, at the boundary, and in the second stage.
    chance = random.Random(policy)
    kills = [
        ("first", chance.randint(2, STEPS["first"] - 3)),
        ("first", STEPS["first"]),  # its last step: the first stage ends or the second begins
        ("second", chance.randint(2, STEPS["second"] - 3)),
    ]
    run_and_kill(config, disturbed, settings, kills)
    expected, actual = state_of(straight), state_of(disturbed)
    assert [len(actual[f"{stage} curve"]) for stage in STEPS] == list(STEPS.values())  # type: ignore[arg-type]
    for name, value in expected.items():
        assert actual[name] == value, name
