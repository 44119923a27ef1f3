"""A curriculum under the real launcher: each stage starts from the weights of the previous one, and a kill changes
nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.engine import trained_weights
from pipeline.export import export
from pipeline.tracking import writer
from pipeline.training import checkpoint_dir
from tests.helpers.jobs import end_of, start_job, wait_for_step, write_experiment

STAGES = {
    "all": {"data": {"tasks": ["what"]}, "train": {"steps": 4, "lora": None}},
    "adapters": {"train": {"trainable": "connector", "lora": {"rank": 2, "dropout": 0.1}, "steps": 5}},
    "connector": {"train": {"trainable": "connector", "steps": 12, "checkpoint": {"every_steps": 2}}},
}
FOLDERS = ["01-all", "02-adapters", "03-connector"]
WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_experiment(tmp_path_factory.mktemp("curriculum"), learning_rate=1e-2)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "stages": STAGES}, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """Returns the output of a job that nothing disturbed."""
    output = config.parent / "straight"
    job = start_job(config, f"output={output}", "--nproc", 2, "--json", config.parent / "figures.json")
    code, out, err = end_of(job, output)
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("stage ")] == [
        f"stage {name}, in {output / folder}" for name, folder in zip(STAGES, FOLDERS, strict=True)
    ]
    return output


def curve(output: Path) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in writer.read_metrics(output)}


def test_each_stage_starts_from_the_weights_of_the_previous_ones(config: Path, straight: Path) -> None:
    base = load_file(config.parent / "language_model" / "model.safetensors")
    first, second, third = (load_file(straight / folder / WEIGHTS) for folder in FOLDERS)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not first[f"language_model.{name}"].equal(base[name])  # trained in the first stage
    assert second[f"language_model.{name}"].equal(first[f"language_model.{name}"])  # and kept by the second
    # The third has no adapters: those of the second are merged into the weights that they adapt.
    adapted = "language_model.model.layers.0.self_attn.q_proj"
    up, down = (second[f"{adapted}.lora_{side}.default.weight"] for side in "BA")
    expected = second[f"{adapted}.base_layer.weight"] + up @ down * (16 / 2)
    assert third[f"{adapted}.weight"].allclose(expected, atol=1e-6) and up.abs().max() > 0
    assert all(third[n].equal(first[n]) for n in third if n.startswith("language_model.") and "_proj" not in n)
    assert not any(third[n].equal(second[n]) for n in third if n.startswith("streams."))
    newest = checkpoint_dir.list_checkpoints(straight / FOLDERS[2])[0]
    saved = trained_weights(newest)
    assert not any(n.startswith("language_model.") for n in saved), "an unchanged language model is not saved again"


def test_a_stage_is_a_run_of_its_own(config: Path, straight: Path) -> None:
    figures = json.loads((config.parent / "figures.json").read_text())
    assert [figures["stages"][name]["steps"] for name in STAGES] == [4, 5, 12]
    assert figures["run_id"] == figures["stages"]["connector"]["run_id"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{straight.parent / 'mlflow.db'}")
    runs = [client.get_run(figures["stages"][name]["run_id"]) for name in STAGES]
    assert [run.data.tags["pal.stage"] for run in runs] == [*STAGES]
    assert {run.data.tags["pal.curriculum"] for run in runs} == {"straight"}
    assert [run.info.status for run in runs] == ["FINISHED"] * 3


def test_an_export_of_a_later_stage_has_the_weights_of_earlier_ones(straight: Path, tmp_path: Path) -> None:
    newest = checkpoint_dir.list_checkpoints(straight / FOLDERS[2])[0]
    assert export(newest, tmp_path / "model")["max_abs_difference"] == 0
    exported, trained = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", straight / FOLDERS[2] / "model")
    )
    assert exported.keys() == trained.keys() and all(exported[n].equal(trained[n]) for n in trained)


def test_a_job_killed_in_a_later_stage_is_the_same_job(config: Path, straight: Path) -> None:
    output = config.parent / "disturbed"
    command = (config, f"output={output}", "--nproc", 2)
    job = start_job(*command)
    wait_for_step(job, output / FOLDERS[2], 3)
    job.kill()
    end_of(job, output)
    code, out, err = end_of(start_job(*command), output)
    assert code == 0, err
    assert "stage all" not in out and "stage adapters" not in out and "resumed from" in out
    for folder in FOLDERS:
        assert curve(output / folder) == curve(straight / folder)
        assert (output / folder / WEIGHTS).read_bytes() == (straight / folder / WEIGHTS).read_bytes()
