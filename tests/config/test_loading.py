"""The config tree is strict and can be overridden; every user error is reported with its key and remedy."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from data_prep.config import PrepareConfig
from pipeline.config import ExperimentConfig, dump_config, load_config
from pipeline.config.yaml_text import dump_yaml, parse_yaml
from pipeline.core.errors import UserError
from pipeline.core.streams import Gain, Stream

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
    assert config.train.learning_rate == 2e-5
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
        ("data.tasks=[a", "override 'data.tasks=[a'", "put it in quotes"),
        ("train.lora={rank: 1, rank: 2}", "key 'rank' is repeated", "correct the value"),
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
        UserError, match=r"train.global_batch_size: 96 questions are not divisible .* use a multiple of 30"
    ):
        config.gradient_accumulation_steps(world_size=5)


def test_a_micro_batch_is_an_upper_bound(config_file: Path) -> None:
    config = load(config_file, "train.global_batch_size=96", "train.micro_batch_size=16")
    assert [config.rows_per_rank(world_size) for world_size in (4, 32)] == [24, 3]
    assert [config.gradient_accumulation_steps(world_size) for world_size in (4, 32)] == [2, 1]


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


@pytest.mark.parametrize(("integration", "gains"), [("plits", [None]), ("lal", [0.2]), ("pal_v3", [0.2, None])])
def test_streams_of_lal_receive_the_gain(config_file: Path, integration: str, gains: list[float | None]) -> None:
    config = load(config_file, f"model.integration={integration}", "model.gain={start: 0.2}")
    streams = config.model.resolve_streams(6)
    assert [stream.gain and stream.gain.start for stream in streams] == gains
    assert [Stream.from_dict(stream.to_dict()) for stream in streams] == list(streams)


def test_custom_streams_have_gains_of_their_own(config_file: Path) -> None:
    stream = "{encoders: [log_mel], integration: lal, audio_layers: [0], gain: {start: 0.3}}"
    settings = ["model.integration=custom", f"model.streams=[{stream}]"]
    assert [s.gain for s in load(config_file, *settings).model.resolve_streams(6)] == [Gain(0.3)]
    with pytest.raises(UserError, match=r"model\.gain: has no effect on integration 'custom'"):
        load(config_file, *settings, "model.gain={start: 0.1}").model.resolve_streams(6)
    plits = stream.replace("lal, audio_layers: [0]", "plits")
    with pytest.raises(UserError, match=r"model\.streams\.0\.gain: has no effect on plits"):
        load(config_file, "model.integration=custom", f"model.streams=[{plits}]").model.resolve_streams(6)


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


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.steps", "010", 10),
        ("train.steps", "08", 8),
        ("train.steps", "1e3", 1000),
        ("train.steps", "1_000", 1000),
        ("train.steps", "1:30", "valid integer"),
        ("train.steps", "true", "is a number, got true"),
        ("train.steps", "yes", "valid integer"),
        ("train.steps", "10.5", "valid integer"),
        ("train.steps", ".inf", "finite"),
        ("train.learning_rate", "2e-5", 2e-5),
        ("train.learning_rate", "1E-4", 1e-4),
        ("train.learning_rate", ".5e-3", 5e-4),
        ("train.learning_rate", "true", "is a number, got true"),
        ("train.learning_rate", ".inf", "is not a finite number"),
        ("train.learning_rate", "inf", "is not a finite number"),
        ("train.learning_rate", "1e999", "is not a finite number"),
        ("train.learning_rate", ".nan", "greater than 0"),
        ("train.learning_rate", "0:30", "valid number"),
        ("data.tasks", "[no, on, yes, off]", ["no", "on", "yes", "off"]),
        ("data.tasks", "[2024-01-01, 1:30, 1_000]", ["2024-01-01", "1:30", "1_000"]),
        ("data.tasks", "[010]", "put this value in quotes"),
        ("data.tasks", "[true]", "put this value in quotes"),
        ("data.tasks", "['010', \"true\"]", ["010", "true"]),
    ],
)
def test_scalars_are_read_as_they_are_meant_or_named(config_file: Path, key: str, text: str, expected: object) -> None:
    section, name = key.split(".")
    values = {**MINIMAL, section: {k: v for k, v in MINIMAL[section].items() if k != name}}  # type: ignore[index]
    head = yaml.safe_dump({k: v for k, v in values.items() if k != section})
    lines = yaml.safe_dump(values[section], default_flow_style=True).strip().removeprefix("{").removesuffix("}")
    config_file.write_text(f"{head}{section}: {{{', '.join(filter(None, [lines, f'{name}: {text}']))}}}\n")
    for overrides in ((), (f"{key}={text}",)):
        if isinstance(expected, str):
            with pytest.raises(UserError, match=rf"{key}.*{expected}"):
                load(config_file, *overrides)
        else:
            assert getattr(getattr(load(config_file, *overrides), section), name) == expected


@pytest.mark.parametrize("word", ["yes", "on", "true", "no", "off", "false"])
def test_words_for_true_and_false_are_accepted_where_a_setting_is_one(config_file: Path, word: str) -> None:
    assert load(config_file, f"train.compile={word}").train.compile is (word in ("yes", "on", "true"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{output: a, output: b}", "key 'output' is repeated"),
        ("output: {{path}}", "a key must be text"),
        ("? [a, b]\n: c", "a key must be text"),
        ("output: a\n---\noutput: b", "but found another document"),
    ],
)
def test_yaml_that_would_lose_a_value_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"c\.yaml:\d+:\d+: YAML syntax error \(.*{fault}"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "value", ["no", "1e-4", "08", "010", "1:30", "2024-01-01", ".5", "1_000", "~", "", "<<", 2e-5, 1e22, 7, None, True]
)
def test_what_is_written_reads_back_equal(value: object) -> None:
    assert parse_yaml(dump_yaml({"a": value, "b": [value]})) == {"a": value, "b": [value]}
