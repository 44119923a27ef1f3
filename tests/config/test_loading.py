"""The config tree is strict and can be overridden; every user error is reported with its key and remedy."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from data_prep.config import PrepareConfig
from pipeline.config import ExperimentConfig, dump_config, load_config
from pipeline.core.errors import UserError

MINIMAL = {
    "output": "runs/x",
    "model": {"language_model": "lm"},
    "data": {"train": "shards"},
    "train": {"steps": 10},
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def load(path: Path, *overrides: str) -> ExperimentConfig:
    return load_config(ExperimentConfig, path, overrides)


def test_overrides_win_and_numbers_that_yaml_reads_as_strings_are_accepted(config_file: Path) -> None:
    config = load(config_file, "train.learning_rate=2e-5", "model.connector.kind=linear", "train.seed=3")
    assert config.train.learning_rate == 2e-5  # PyYAML alone reads 2e-5 as a string
    assert config.model.connector.kind == "linear"
    assert config.train.seed == 3


def test_a_resolved_config_reads_back_equal(config_file: Path, tmp_path: Path) -> None:
    config = load(config_file, "model.integration=pal_v3", "model.num_audio_layers=1/3")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load(resolved) == config


@pytest.mark.parametrize(
    ("override", "names", "remedy"),
    [
        ("train.sed=1", "train.sed", "did you mean 'seed'?"),
        ("model.conector.kind=mlp", "model.conector", "did you mean 'connector'?"),
        ("model.connector.knd=mlp", "model.connector.knd", "did you mean 'kind'?"),
        ("train.checkpoint.evry_steps=2", "train.checkpoint.evry_steps", "did you mean 'every_steps'?"),
        ("train.seed=abc", "train.seed", "correct this value"),
        ("train.micro_batch_size=0", "train.micro_batch_size", "correct this value"),
        ("model.num_audio_layers=1.5", "model.num_audio_layers", "correct this value"),
        ("model.audio_layers=[0]", None, None),
        ("train.epochs=1", "train.steps", "give exactly one"),
        ("train.lora={}", "train.lora", "set trainable to connector"),
        ("model.integration=custom", "model.streams", "set both or neither"),
        ("train.seed", "override 'train.seed'", "write for example"),
        ("output.name=1", "override 'output.name=1'", "check the key"),
    ],
)
def test_each_error_is_one_line_with_key_and_remedy(
    config_file: Path, override: str, names: str | None, remedy: str | None
) -> None:
    if names is None:
        load(config_file, override)
        return
    with pytest.raises(UserError) as caught:
        load(config_file, override)
    line = str(caught.value)
    assert names in line
    assert remedy is not None and remedy in line
    assert "\n" not in line


def test_missing_keys_missing_files_and_yaml_syntax_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    with pytest.raises(UserError, match="no such config file"):
        load(path)
    path.write_text("train: [1, 2\nmodel: x")
    with pytest.raises(UserError, match=r"broken.yaml:\d+:\d+: YAML syntax error"):
        load(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="holds a list"):
        load(path)
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "data"}))
    with pytest.raises(UserError, match="data: is missing"):
        load(path)


def test_a_list_of_layers_and_a_rule_for_them_exclude_each_other(config_file: Path) -> None:
    with pytest.raises(UserError, match="give either the list or the rule"):
        load(config_file, "model.audio_layers=[0]", "model.layer_stride=2")


@pytest.mark.parametrize(
    ("text", "count"), [("1/3", Fraction(1, 3)), ("0.5", Fraction(1, 2)), ("4", 4), ("null", None), ("1", 1)]
)
def test_layer_counts_are_numbers_or_fractions(config_file: Path, text: str, count: object) -> None:
    assert load(config_file, f"model.num_audio_layers={text}").model.num_audio_layers == count


def test_the_global_batch_must_be_divisible(config_file: Path) -> None:
    config = load(
        config_file, "train.global_batch_size=96", "train.micro_batch_size=8", "data.questions_per_sequence=6"
    )
    assert config.gradient_accumulation_steps(world_size=2) == 1
    assert config.gradient_accumulation_steps(world_size=1) == 2
    with pytest.raises(
        UserError, match=r"train.global_batch_size: 96 questions are not divisible .* use a multiple of 144"
    ):
        config.gradient_accumulation_steps(world_size=3)


def test_urls_keep_their_slashes_and_remote_sets_need_a_cache(config_file: Path, tmp_path: Path) -> None:
    config = load(config_file, "data.train=s3://bucket/set", f"data.cache={tmp_path}", "data.cache_gib=0.5")
    assert config.data.train == "s3://bucket/set"
    with pytest.raises(UserError, match=r"data\.train: is in an object store, but data\.cache is not set"):
        load(config_file, "data.train=s3://bucket/set")
    with pytest.raises(UserError, match=r"data\.cache_gib: has no effect without data\.cache"):
        load(config_file, "data.cache_gib=1")


def test_a_mixture_leaves_something_for_the_training_set(config_file: Path) -> None:
    mixture = "data.mixture=[{share: 0.6, tasks: [a]}, {share: %s, path: text}]"
    assert [m.share for m in load(config_file, mixture % 0.3).data.mixture] == [0.6, 0.3]
    with pytest.raises(UserError, match=r"data\.mixture: its shares leave nothing"):
        load(config_file, mixture % 0.4)


@pytest.mark.parametrize(
    ("integration", "setting"),
    [
        ("plits", "audio_queries=true"),
        ("plits", "norm_audio_tokens=false"),
        ("plits", "num_audio_layers=2"),
        ("plits", "layer_stride=2"),
        ("lal", "summary_stride=2"),
        ("flamingo", "audio_queries=true"),
    ],
)
def test_a_setting_without_effect_is_an_error(config_file: Path, integration: str, setting: str) -> None:
    config = load(config_file, f"model.integration={integration}", f"model.{setting}")
    with pytest.raises(
        UserError, match=rf"model.{setting.split('=')[0]}: has no effect on integration '{integration}'"
    ):
        config.model.resolve_streams(6)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("{kind: whisper, model: w, laier: 3}", r"encoders\.clap\.laier: unknown key .* did you mean 'layer'"),
        ("{kind: log_mel, hop_ms: -1}", r"encoders\.clap\.hop_ms: Input should be greater than 0"),
    ],
)
def test_an_error_below_a_union_names_the_key_as_it_was_written(tmp_path: Path, encoder: str, message: str) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text(f"manifest: m\noutput: o\nencoders: {{clap: {encoder}}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(PrepareConfig, file)
