"""The measurements of LAL's start run on a small random model, are not repeated, and make a page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from tests.helpers.feature_sets import write_feature_set
from tests.real import start, start_page


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("start")
    features = write_feature_set(folder / "features", [2] * 6, encoders={"whisper": 8})
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 4}
    texts = [f"Question {c} about clip {c}? answer {c}" for c in range(6)]
    save_random_language_model(folder / "model", texts, RandomLanguageModel(**sizes, vocab_size=300))
    places = [str(features), str(features), str(folder / "model")]
    out = folder / "out.jsonl"
    variants = ["text", "gap", "lal", "lal_gain_0.0", "lal_gain_0.1:long", "pal_v3:embedding_scale"]
    for _ in range(2):
        start.main(
            start.parser().parse_args(["untrained", str(out), *places, "--questions", "6", "--variants", *variants])
        )
    steps = ["--steps", "2", "--warmup", "1", "--questions", "6", "--variants", "plits", "lal_gain_0.1"]
    start.main(start.parser().parse_args(["train", str(out), *places, *steps]))
    start_page.main(folder / "page.md", [out])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_variant_is_measured_once(measured: list[dict[str, Any]]) -> None:
    names = [row["variant"] for row in measured]
    assert len(names) == len(set(names)) == 8


def test_the_plain_model_is_at_no_distance_from_itself(measured: list[dict[str, Any]]) -> None:
    distances = {row["variant"]: row["kl"] for row in measured if "kl" in row}
    assert distances["text"] == 0 and all(kl != 0 for name, kl in distances.items() if name != "text")


def test_a_gain_trains_from_its_start(measured: list[dict[str, Any]]) -> None:
    (trained,) = [row for row in measured if row["measured"] == "train" and row["variant"] == "lal_gain_0.1"]
    assert len(trained["losses"]) == 2 and len(trained["gains"]) == 3
    assert any(abs(gain - 0.1) > 1e-4 for gain in trained["gains"])
