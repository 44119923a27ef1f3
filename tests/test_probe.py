"""`pal probe` writes shares that sum to 1, scores with each pathway hidden, and pictures; `pal ask --picture` draws any
file."""

import json
from pathlib import Path

import pytest

from pipeline.ask import main as ask
from pipeline.core.errors import UserError
from pipeline.probe import main
from tests.helpers.corpora import clip_row, prepare_config, prepare_here, tone, write_manifest


def test_the_command_writes_shares_scores_and_pictures(exported: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "pictures", tmp_path / "probe.json"
    arguments = ["--out", str(out), "--json", str(file), "--max-new-tokens=2", "--questions=2"]
    assert main([str(exported / "model"), str(exported / "set"), *arguments]) == 0
    figures = json.loads(file.read_text())
    assert [row["layer"] for row in figures["attention_mass"]] == [0, 1, 2]
    for row in figures["attention_mass"]:
        for shares in (row, *row["by_head"], *row["by_domain"].values()):
            assert sum(shares[kind] for kind in ("text", "lal", "plits")) == pytest.approx(1)
        assert (row["lal"] > 0) == (row["layer"] < 1), "a third of three layers"
    assert list(figures["masking"]) == ["none", "lal", "plits", "lal+plits", "plain"]
    conditions = [row["condition"] for row in figures["masking"].values()]
    assert conditions[-2:] == ["audio hidden, its positions kept (gap)", "text alone: no audio, no gap"]
    assert all(set(row) >= {"accuracy", "ci95", "by_domain"} for row in figures["masking"].values())
    names = {file.name for file in out.iterdir()}
    assert names >= {"attention_by_layer.png", "attention_by_head.png", "masking.png"}
    assert any(name.startswith("attention_over_time_") for name in names)


def test_a_foreign_set_and_impossible_settings_are_refused(exported: Path, tmp_path: Path) -> None:
    model = str(exported / "model")
    with pytest.raises(UserError, match="--questions"):
        main([model, str(exported / "set"), "--questions=0"])
    import soundfile

    soundfile.write(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    manifest = write_manifest(tmp_path / "m.jsonl", [clip_row("a", "a.wav")])
    prepare_here(prepare_config(manifest, tmp_path / "set", encoders={"log_mel": {"kind": "log_mel", "num_mels": 32}}))
    with pytest.raises(UserError, match="have fingerprint"):
        main([model, str(tmp_path / "set")])


def test_a_question_is_drawn(exported: Path, tmp_path: Path) -> None:
    arguments = [str(exported / "model"), str(exported / "clip.flac"), "What?", "Why?", "--max-new-tokens=2"]
    assert ask([*arguments, "--picture", str(tmp_path / "look.png")]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"look-1.png", "look-2.png"}
