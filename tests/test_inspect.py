"""`pal inspect` shows what is stored and what is trained on, as the loader of the training has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config import ExperimentConfig, load_config
from pipeline.core.ranks import Ranks
from pipeline.core.transcript import Part, Style, stdout_style, visible
from pipeline.data.chat_template import build_chat_template
from pipeline.data.feature_set import open_feature_set
from pipeline.data.loader import TrainingLoader
from tests.helpers.feature_sets import frames_of, write_feature_set, write_rows
from tests.helpers.jobs import write_experiment


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with 16 clips of 3 questions each."""
    return write_experiment(tmp_path_factory.mktemp("experiment"))


def inspect(*arguments: object) -> int:
    return cli.main(["inspect", *map(str, arguments)])


def rows_of(file: Path, *arguments: object) -> list[dict[str, Any]]:
    assert inspect(*arguments, "--json", file) == 0
    return json.loads(file.read_text())["rows"]


def test_a_set_is_shown_as_it_is_stored(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(experiment.parent / "features", "--number", 1) == 0
    shown = capsys.readouterr().out
    assert "16 clips" in shown and "48 questions" in shown and "1 of 16 clips" in shown
    assert "clip-0" in shown and "1.00 s" in shown and "3 of log_mel" in shown and "dataset synth" in shown
    assert "⟨audio⟩Question 1 about clip 0??" in shown and "answer 0.1" in shown and "clip-1" not in shown


def test_the_rows_of_a_set_are_its_questions(experiment: Path, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.json", experiment.parent / "features", "--number", 1)
    assert len(rows) == 48
    expected = {
        "clip_id": "clip-2",
        "question_id": "clip-2/1",
        "audio_ids": ["clip-2"],
        "duration_s": [3.0],
        "dataset": "synth",
        "domain": "sound",
        "task": "count",
        "turns": [
            {"role": "user", "text": "<audio>Question 1 about clip 2??"},
            {"role": "assistant", "text": "answer 2.1"},
        ],
        "choices": None,
        "answer": "answer 2.1",
    }
    assert {key: value for key, value in rows[7].items() if key != "audio"} == expected
    assert rows[7]["audio"] == [""], "the set was written without paths"


def test_the_rows_of_a_config_hold_the_tokens_and_their_labels(experiment: Path, tmp_path: Path) -> None:
    config = load_config(ExperimentConfig, experiment)
    tokenizer, template = build_chat_template(config.model.language_model, config.data, "answer")
    rows = rows_of(tmp_path / "rows.json", experiment)
    assert len(rows) == 48 and [row["sequence"] for row in rows] == list(range(48))
    for row in rows:
        assert row["input_ids"].count(template.audio_token_id) == row["rendered"].count("<audio>") == 1
        assert template.decode([label for label in row["labels"] if label >= 0]) == row["answer"]
        assert tokenizer.decode(row["input_ids"]) == row["rendered"]


def test_text_brackets_mark_the_tokens_with_loss(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(experiment, "--clip", "clip-3", "--number", 1) == 0
    shown = capsys.readouterr().out
    assert "⟦answer 3.0" in shown and shown.count("⟦") == 2, "one is the legend"
    assert "data.max_text_tokens 1,024" in shown and "of 4,096 positions" in shown


@pytest.mark.parametrize("packed", [1, 2])
def test_an_epoch_is_shown_in_the_order_of_the_training(experiment: Path, tmp_path: Path, packed: int) -> None:
    overrides = [f"data.questions_per_sequence={packed}"]
    config = load_config(ExperimentConfig, experiment, overrides)
    features = open_feature_set(config.data.train, config.model.encoders, config.data)
    _, template = build_chat_template(config.model.language_model, config.data, "answer")
    loader = TrainingLoader([features], template, config.data, config.train, Ranks(0, 1, 0, 1))
    sequences = config.train.global_batch_size // packed
    rows = rows_of(tmp_path / "rows.json", experiment, *overrides, "--epoch", 0)
    for step, batches in zip(range(3), loader, strict=False):
        trained = {question_id for batch in batches for question_id in batch["question_ids"]}
        shown = [row for row in rows if row["sequence"] // sequences == step]
        assert {row["question_id"] for row in shown} == trained
    assert len({row["question_id"] for row in rows}) == 48


def test_a_packed_question_has_the_tokens_that_it_attends_to(experiment: Path, tmp_path: Path) -> None:
    alone = {row["question_id"]: row for row in rows_of(tmp_path / "rows.json", experiment)}
    packed = rows_of(tmp_path / "packed.json", experiment, "data.questions_per_sequence=2", "--epoch", 1)
    assert len(packed) == 48 and len({row["sequence"] for row in packed}) < 48
    for row in packed:
        for key in ("input_ids", "labels", "rendered", "turns"):
            assert row[key] == alone[row["question_id"]][key]


def test_packed_questions_are_shown_behind_what_they_share(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(experiment, "data.questions_per_sequence=3", "--epoch", 0, "--number", 1) == 0
    shown = capsys.readouterr().out
    assert shown.count("Listen.") == 1 and shown.count("⟦answer") == 3


def test_a_control_token_that_a_text_spells_is_noted(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"question_id": "q", "question": "Is <|im_end|> a sound?", "answer": "no", "task": "t"}
    clip = {
        "clip_id": "c",
        "duration_s": 1.0,
        "dataset": "d",
        "domain": "x",
        "questions": [question],
        "audio": "/a.wav",
    }
    features = write_rows(tmp_path / "set", [clip], {"log_mel": [frames_of(0, 8)]})
    assert inspect(experiment, f"data.train={features}", "data.validation=null") == 0
    shown = capsys.readouterr().out
    assert "Is <|im_end|> a sound?" in shown and "plain text here, not tokens: <|im_end|>\n" in shown
    assert "/a.wav" in shown


def test_questions_without_audio_have_no_place_of_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = {"question_id": "q", "question": "Why?", "answer": "so", "task": "t"}
    clip = {"clip_id": "c", "duration_s": 0.0, "dataset": "d", "domain": "text", "questions": [question]}
    (row,) = rows_of(tmp_path / "rows.json", write_rows(tmp_path / "set", [clip], {}))
    assert (row["audio"], row["turns"][0]["text"]) == ([], "Why?")
    assert "1 question without audio" in capsys.readouterr().out


def test_controls_and_hidden_characters_become_visible() -> None:
    assert visible("a\tb\x1b[31m\u202e\n👩\u200d👧") == "a␉b␛[31m⟨U+202E⟩\n👩\u200d👧"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not stdout_style().color
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert stdout_style().color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not stdout_style().color
    parts = [Part("audio", audio=True), Part("x"), Part("y", loss=True)]
    assert Style(color=False).conversation(parts) == "⟨audio⟩x⟦y⟧"
    assert Style(color=True).conversation(parts) == "\x1b[36m⟨audio⟩\x1b[0mx\x1b[32my\x1b[0m"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{features}", "--clip", "clip-33"], "clip 'clip-33': is not in {features}; did you mean 'clip-3'?"),
        (["{features}", "--clip", "zzz"], "clip 'zzz': is not in {features}; its 16 clips begin with clip-0, clip-1"),
        (["{config}", "--clip", "clip-33"], "did you mean 'clip-3'?"),
        (["{features}", "--epoch", "0"], "--epoch: applies to a training config"),
        (["{features}", "a=b"], "a=b: applies to a training config"),
        (["{config}", "--epoch", "-1"], "--epoch: -1 is below 0"),
        (["{config}", "--number", "0"], "--number: 0 is below 1"),
        (["{config}", "data.tasks=[wha]"], "the feature set has no 'wha'; did you mean 'what'?"),
        (["{config}", "--stage", "x"], "--stage: the config has no stages"),
        (["{config}", "--cache", "x"], "--cache: applies to a feature set"),
        (["{folder}"], "is not a finished feature set"),
        (["{folder}/m.jsonl"], "is not a prepared feature set; prepare it with `pal prepare`"),
        (["demo_prepare"], "configures a preparation, not a training; give the feature set that it makes"),
        (["no_such"], "no such config file"),
        (["s3://bucket/set"], "give --cache a folder on a local disk"),
    ],
)
def test_a_mistake_is_one_line(
    experiment: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"features": experiment.parent / "features", "config": experiment, "folder": experiment.parent}
    assert inspect(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1


def test_the_error_about_a_rejected_clip_gives_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = write_feature_set(tmp_path / "set", [1])
    other = {"clip_id": "of two\u2028lines", "reason": "missing", "detail": "no such file"}
    reject = {"clip_id": "gone", "reason": "missing", "detail": "no such file"}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (other, reject)]
    (features / "rejects.jsonl").write_text("".join(lines), encoding="utf-8")
    assert inspect(features, "--clip", "gone") == 2
    assert "was rejected when" in (error := capsys.readouterr().err) and "missing: no such file" in error
