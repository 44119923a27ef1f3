"""Every input format: what a model is trained on equals what the publisher of the data meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.loading import dump_config
from tests.helpers.corpora import prepare_config, prepare_here
from tests.roundtrip.training_view import difference, expected, inspect, seen_by_model
from tests.roundtrip.truth import PLACEHOLDERS, TEXTS, Truth, in_one_file, make_conversations, make_truth
from tests.roundtrip.writers import CHATS, PLAIN, Written, write_own_conversations

SEEDS = [pytest.param(seed, marks=[] if seed < 2 else pytest.mark.slow) for seed in range(12)]
READ_PLACEHOLDERS = ("jsonl", "openaqa", "slam_llm")  # formats in whose questions `<audio>` is a place, not a text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLAIN)
def test_single_questions(name: str, seed: int, tmp_path: Path) -> None:
    truth = make_truth(seed, texts=TEXTS if name in READ_PLACEHOLDERS else TEXTS + PLACEHOLDERS)
    check(truth, PLAIN[name](truth, tmp_path / "corpus"), tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CHATS)
def test_single_questions_in_chats(name: str, seed: int, tmp_path: Path) -> None:
    truth = make_truth(seed)
    check(truth, CHATS[name](truth, tmp_path / "corpus"), tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CHATS)
def test_conversations(name: str, seed: int, tmp_path: Path) -> None:
    truth = make_conversations(seed)
    check(truth, CHATS[name](truth, tmp_path / "corpus"), tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
def test_conversations_of_our_own_format(seed: int, tmp_path: Path) -> None:
    truth = make_conversations(seed, texts=TEXTS + PLACEHOLDERS)
    check(truth, write_own_conversations(truth, tmp_path / "corpus"), tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["jsonl", "openaqa", "slam_llm", "csv", "tsv", *CHATS])
def test_segments_of_one_file(name: str, seed: int, tmp_path: Path) -> None:
    truth = in_one_file(make_truth(seed))
    check(truth, (PLAIN | CHATS)[name](truth, tmp_path / "corpus"), tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*CHATS, "own"])
def test_conversations_about_segments(name: str, seed: int, tmp_path: Path) -> None:
    truth = in_one_file(make_conversations(seed))
    check(truth, {**CHATS, "own": write_own_conversations}[name](truth, tmp_path / "corpus"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharegpt", "parts", "parquet", "webdataset"])
def test_the_commands_themselves(name: str, tmp_path: Path) -> None:
    truth = make_truth(20) if name in PLAIN else make_conversations(20)
    written = (PLAIN | CHATS)[name](truth, tmp_path / "corpus")
    config, features = tmp_path / "prepare.yaml", tmp_path / "features"
    config.write_text(dump_config(prepare_config(written.manifest, features, **written.settings)))
    command = [sys.executable, "-m", "pipeline.cli", "prepare", str(config)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = seen_by_model(inspect(tmp_path, features), features, truth.sounds)
    assert not difference(seen, expected(written.items))


def check(truth: Truth, written: Written, folder: Path) -> None:
    """Prepares a manifest, and compares what `pal inspect` shows with what was meant."""
    features = folder / "features"
    prepare_here(prepare_config(written.manifest, features, **written.settings))
    rejects = [json.loads(line) for line in (features / "rejects.jsonl").read_text().splitlines()]
    seen = seen_by_model(inspect(folder, features), features, truth.sounds)
    wanted = expected(written.items)
    assert not rejects
    assert not difference(seen, wanted), difference(seen, wanted)
