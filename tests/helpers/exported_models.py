"""A prepared clip and an exported model that reads its features."""

from __future__ import annotations

from pathlib import Path

import soundfile
import torch

from pipeline.config import ExperimentConfig, validate_config
from pipeline.data.chat_template import build_chat_template
from pipeline.data.feature_set import FeatureSet
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.training.build import build_model
from pipeline.training.exported_model import save_model
from tests.helpers.corpora import clip_row, prepare_config, prepare_here, tone, write_manifest


def write_model(folder: Path, integration: str, **sizes: int) -> Path:
    """Writes a clip of 70 s (three windows) at 44.1 kHz, its features, and an untrained model that reads them."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 2, **sizes}
    soundfile.write(folder / "clip.flac", tone(70.0, 44100), 44100)
    manifest = write_manifest(folder / "m.jsonl", [clip_row("clip", "clip.flac")])
    prepare_here(prepare_config(manifest, folder / "set"))
    save_random_language_model(folder / "lm", ["What is it? a dog"] * 5, RandomLanguageModel(**sizes))
    values = {
        "output": str(folder / "run"),
        "model": {"language_model": str(folder / "lm"), "encoders": ["log_mel"], "integration": integration},
        "data": {"train": str(folder / "set"), "system_prompt": "Listen."},
        "train": {"steps": 1, "precision": "fp32"},
    }
    config = validate_config(ExperimentConfig, values, "test")
    tokenizer, chat_template = build_chat_template(config.model.language_model, config.data, config.train.loss_on)
    torch.manual_seed(0)
    contract = FeatureSet(folder / "set", ["log_mel"]).contract
    model = build_model(config, contract, chat_template.audio_token_id)
    save_model(model, tokenizer, config, folder / "model")
    return folder
