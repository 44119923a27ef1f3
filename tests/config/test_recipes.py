"""The shipped recipes are valid curricula for every integration, and train a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Qwen2Config

from pipeline import train
from pipeline.config import ExperimentConfig, load_config, resolve_stages
from pipeline.core.feature_contract import CONTRACT_FILE, EncoderContract, FeatureContract
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.tracking.writer import read_metrics
from pipeline.training import run_dir
from tests.helpers.feature_sets import byte_tokenizer, frames_of, write_rows
from tests.helpers.jobs import train_in_process
from tests.helpers.ranks import run_on_ranks

INTEGRATIONS = {
    "plits": ["model.integration=plits"],
    "lal": ["model.integration=lal"],
    "pal_v2": ["model.integration=pal_v2", "model.encoders=[whisper, sslam, clap]", "model.connector.kind=lfst"],
    "pal_v3": ["model.integration=pal_v3"],
}
# The published models: width, feed-forward width, layers, heads, key heads, head width, vocabulary, tied embeddings,
# and the published number of parameters in billions.
LANGUAGE_MODELS: dict[str, tuple[int, int, int, int, int, int, int, bool, float]] = {
    "smollm2_135m": (576, 1536, 30, 9, 3, 64, 49152, True, 0.1345),
    "llama_3_2_1b": (2048, 8192, 16, 32, 8, 64, 128256, True, 1.236),
    "llama_3_2_3b": (3072, 8192, 28, 24, 8, 128, 128256, True, 3.213),
    "qwen_2_5_1_5b": (1536, 8960, 28, 12, 2, 128, 151936, True, 1.544),
    "llama_3_1_8b": (4096, 14336, 32, 32, 8, 128, 128256, False, 8.030),
    "llama_3_1_70b": (8192, 28672, 80, 64, 8, 128, 128256, False, 70.554),
}
STEPS = 3


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a small set like that of `openaqa_prepare`: three encoders, three tasks, two of them for each clip."""
    folder = tmp_path_factory.mktemp("features")
    questions = [
        {"question_id": f"{c}/{task}", "question": f"What is {c}?", "answer": f"clip {c}", "task": task}
        for c in range(8)
        for task in (("cla_label", "cla_label_des")[c % 2], "open-ended question")
    ]
    rows = [
        {
            "clip_id": f"{c}",
            "duration_s": 10.0,
            "dataset": "as",
            "domain": "sound",
            "questions": questions[2 * c : 2 * c + 2],
        }
        for c in range(8)
    ]
    grids = {"sslam": (64, 8), "clap": (32, 2)}
    frames = {
        "whisper": [frames_of(c, 1280) for c in range(8)],
        **{name: [np.full((grid[0] * grid[1], 768), c, np.float16) for c in range(8)] for name, grid in grids.items()},
    }
    write_rows(folder, rows, frames)
    contract = json.loads((folder / CONTRACT_FILE).read_text())
    contract.pop("fingerprint")
    for name, grid in grids.items():
        previous = contract["encoders"][name]
        contract["encoders"][name] = EncoderContract.model_validate({**previous, "grid": grid}).model_dump(mode="json")
    (folder / CONTRACT_FILE).write_text(FeatureContract.model_validate(contract).dump())
    return folder


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes folders with the configs of the published models and a small tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("language_models")
    for name, (width, ffn, layers, heads, key_heads, head_dim, vocabulary, tied, _) in LANGUAGE_MODELS.items():
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary}
        kind, extra = (Qwen2Config, {}) if name.startswith("qwen") else (LlamaConfig, {"head_dim": head_dim})
        kind(**sizes, **extra, tie_word_embeddings=tied).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("gpus", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("recipe", sorted(LANGUAGE_MODELS))
def test_the_global_batch_of_every_recipe_divides(recipe: str, gpus: int) -> None:
    for stage in resolve_stages(load_config(ExperimentConfig, recipe)).values():
        rows, passes = stage.rows_per_rank(gpus), stage.gradient_accumulation_steps(gpus)
        assert rows * gpus * stage.data.questions_per_sequence == stage.train.global_batch_size
        assert passes == -(-rows // stage.train.micro_batch_size)


@pytest.mark.parametrize("recipe", LANGUAGE_MODELS)
def test_every_recipe_passes_its_checks_with_every_integration(
    recipe: str,
    features: Path,
    language_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    paths = [f"data.train={features}", "data.cache=null", f"model.language_model={language_models / recipe}"]
    for integration, settings in INTEGRATIONS.items():
        assert train.main([recipe, *paths, *settings, "--dry-run", "--nproc", "8"]) == 0
        _, connector, joint = capsys.readouterr().out.split("\nstage ")
        assert "on 8 questions about 8 clips" in connector and "on 16 questions about 8 clips" in joint
        language_model = LANGUAGE_MODELS[recipe][-1] * 1e9
        (total, audio), (total_with_adapters, trained) = _parameters(connector), _parameters(joint)
        assert total - audio == pytest.approx(language_model, rel=1e-3), integration
        assert 0 < audio < language_model / 2
        adapters = total_with_adapters - total
        assert trained == (audio + adapters if adapters else total)
        assert (adapters > 0) == (recipe == "llama_3_1_70b") and adapters < language_model / 100


def _parameters(text: str) -> tuple[int, int]:
    line = next(line for line in text.splitlines() if line.startswith("parameters:"))
    total, trained = (int(word.replace(",", "")) for word in line.split() if word[0].isdigit())
    return total, trained


@pytest.mark.slow
def test_the_1b_recipe_trains_a_small_model_with_every_integration(features: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 4, "num_heads": 4}
    texts = [f"What is {c}? clip {c}" for c in range(8)]
    save_random_language_model(tmp_path / "language_model", texts, RandomLanguageModel(**sizes, vocab_size=300))
    run_on_ranks(_train_each, 1, features, tmp_path)
    for integration in INTEGRATIONS:
        for stage in ("01-connector", "02-joint"):
            metrics = read_metrics(tmp_path / integration / stage)
            assert metrics[-1][0] == STEPS and all(
                np.isfinite(m["train/loss"]) for _, m in metrics if "train/loss" in m
            )
            assert run_dir.is_finished(tmp_path / integration / stage)


def _train_each(features: Path, folder: Path) -> None:
    paths = [f"data.train={features}", "data.cache=null", f"model.language_model={folder / 'language_model'}"]
    for integration, settings in INTEGRATIONS.items():
        short = [f"output={folder / integration}", "data.workers=0", "train.global_batch_size=32"]
        short += [
            f"stages.{stage}.train.{length}"
            for stage in ("connector", "joint")
            for length in (f"steps={STEPS}", "epochs=null")
        ]
        config = load_config(ExperimentConfig, "llama_3_2_1b", [*paths, *settings, *short])
        train_in_process(resolve_stages(config).values())
