"""Stages of a curriculum are plain experiments that build on each other; an error in a stage names the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import ExperimentConfig, choose_stages, dump_config, load_config, resolve_stages
from pipeline.core.errors import UserError

CURRICULUM: dict[str, Any] = {
    "output": "runs/x",
    "model": {"language_model": "lm", "num_audio_layers": "1/3"},
    "data": {"train": "shards", "questions_per_sequence": 2},
    "train": {"steps": 100, "lora": None, "checkpoint": {"keep": 1}},
    "stages": {
        "connector": {"data": {"tasks": ["what"]}, "train": {"trainable": "connector", "epochs": 2}},
        "joint": {"train": {"learning_rate": 1e-5, "checkpoint": {"every_steps": 7}}},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "curriculum.yaml"
    path.write_text(yaml.safe_dump(CURRICULUM, sort_keys=False))
    return path


def stages_of(path: Path, *overrides: str) -> dict[str, ExperimentConfig]:
    return resolve_stages(load_config(ExperimentConfig, path, overrides))


def test_each_stage_is_the_experiment_with_its_own_overrides(file: Path) -> None:
    experiment = load_config(ExperimentConfig, file)
    connector, joint = stages_of(file).values()
    assert [connector.output, joint.output] == [Path("runs/x/01-connector"), Path("runs/x/02-joint")]
    assert connector.starts_from is None and joint.starts_from == connector.output
    assert connector.model == joint.model == experiment.model
    assert connector.data == experiment.data.model_copy(update={"tasks": ["what"]}) and joint.data == experiment.data
    assert (connector.train.trainable, connector.train.steps, connector.train.epochs) == ("connector", None, 2)
    assert (joint.train.trainable, joint.train.steps, joint.train.learning_rate) == ("all", 100, 1e-5)
    assert (joint.train.checkpoint.every_steps, joint.train.checkpoint.keep) == (7, 1)
    assert joint.tracking.run_name == "x/joint" and joint.tracking.tags == {"pal.curriculum": "x", "pal.stage": "joint"}
    assert connector.tracking.uri == joint.tracking.uri == f"sqlite:///{Path('runs').absolute()}/mlflow.db"


def test_a_resolved_stage_reads_back_as_a_plain_experiment(file: Path, tmp_path: Path) -> None:
    for stage in stages_of(file).values():
        (tmp_path / "stage.yaml").write_text(dump_config(stage))
        read = load_config(ExperimentConfig, tmp_path / "stage.yaml")
        assert read == stage and resolve_stages(read) == {"": stage}


def test_a_stage_is_overridden_and_selected_by_its_name(file: Path) -> None:
    assert stages_of(file, "stages.joint.train.tokens=500")["joint"].train.tokens == 500
    assert stages_of(file, "starts_from=runs/before")["connector"].starts_from == Path("runs/before")
    (chosen,) = choose_stages(load_config(ExperimentConfig, file), "joint").values()
    assert chosen == stages_of(file)["joint"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.joint.train.stps=1", "stages.joint: train.stps: unknown key (value 1); did you mean 'steps'?"),
        ("stages.joint.dat.tasks=[a]", "stages.joint.dat: unknown key"),
        ("stages.joint.train={steps: 1, epochs: 1}", "stages.joint: train.steps: is one of"),
        ("stages.joint.train.lora={}", "stages.joint: train.lora"),
        ("stages.joint.data.mixture=[{share: 2}]", "stages.joint: data.mixture.0.share"),
        ("stages={a/b: {}}", "stages.a/b"),
    ],
)
def test_an_error_in_a_stage_names_the_stage(file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        stages_of(file, override)
    assert expected in str(caught.value)


def test_unknown_and_repeated_stages_are_reported(file: Path) -> None:
    with pytest.raises(UserError, match="there is no stage 'jont'; did you mean 'joint'"):
        choose_stages(load_config(ExperimentConfig, file), "jont")
    with pytest.raises(UserError, match="has no stages"):
        choose_stages(load_config(ExperimentConfig, file, ["stages={}"]), "joint")
    file.write_text(file.read_text() + "  joint: {}\n")
    with pytest.raises(UserError, match=r"curriculum.yaml:\d+:3: YAML syntax error \(key 'joint' is repeated\)"):
        load_config(ExperimentConfig, file)


def test_a_run_needs_exactly_one_length(file: Path) -> None:
    with pytest.raises(UserError, match=r"train\.steps: needs exactly one of steps, epochs, tokens"):
        load_config(ExperimentConfig, file, ["stages={}", "train.steps=null"])
    with pytest.raises(UserError, match=r"stages\.joint: train\.steps: needs exactly one"):
        stages_of(file, "train.steps=null")


def test_a_file_overrides_its_base(file: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("base: curriculum.yaml\noutput: runs/y\nstages: {joint: {train: {steps: 3}}}\n")
    config = load_config(ExperimentConfig, small, ["train.seed=4"])
    assert config.output == Path("runs/y") and config.train.seed == 4 and config.data.questions_per_sequence == 2
    assert resolve_stages(config)["joint"].train.steps == 3 and resolve_stages(config)["connector"].train.epochs == 2
    small.write_text("base: small.yaml\n")
    with pytest.raises(UserError, match="is its own base"):
        load_config(ExperimentConfig, small)
    small.write_text("base: smal\n")
    with pytest.raises(UserError, match="no such config file"):
        load_config(ExperimentConfig, small)
