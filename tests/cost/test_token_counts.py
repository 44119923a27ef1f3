"""The number of audio tokens has one owner, the connector: what it counts is what its module returns, and what every
plan, bound and metric counts with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pipeline.config import ExperimentConfig, validate_config
from pipeline.core.feature_contract import EncoderContract, FeatureContract
from pipeline.core.streams import Connector, Stream
from pipeline.cost.activations import Execution, activation_bytes
from pipeline.cost.flops import RowShape, sequence_shape, training_flops
from pipeline.model import PalConfig, PalForCausalLM
from pipeline.model.connectors import build_connector, count_audio_tokens
from pipeline.training.build import audio_positions
from pipeline.training.step_metrics import step_flops
from tests.helpers.small_models import AUDIO_TOKEN, language_model_config

SMALL = {"num_layers": 1, "num_heads": 2, "hidden_size": 8}
LFST = Connector("lfst", **SMALL)
CONNECTORS = [
    Connector("linear"),
    Connector("mlp"),
    Connector("conv", summary_stride=3),
    Connector("conv", summary_stride=7),
    Connector("qformer", num_queries=5, **SMALL),
    LFST,
]
# Grid of a window, its duration, and the frame rate: CLAP, SSLAM, and SSLAM whose time steps are pooled in pairs.
GRIDS = {"clap": (32, 2), "sslam": (64, 8), "pooled": (32, 8)}
WINDOW_S = {"clap": 10.0, "sslam": 10.24, "pooled": 10.24}
# Shorter than a time step of the query grid, within a window, just over one and three of them, and several.
SECONDS = [0.1, 3.1, 10.0, 10.3, 30.72, 31.0, 119.9]


def frames_of(encoder: str, seconds: float) -> int:
    """Frames of a clip, windows one after the other, all frequency bands of every time step that has audio."""
    steps, bands = GRIDS[encoder]
    return math.ceil(round(seconds / WINDOW_S[encoder] * steps, 6)) * bands


def tokens_of_module(connector: Connector, encoders: tuple[str, ...], frames: list[int]) -> tuple[int, int]:
    """Tokens of one clip by the module's own count, and tokens that it really returns."""
    module = build_connector(connector, [6] * len(encoders), [GRIDS[name] for name in encoders], 10)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    lengths = [torch.tensor([n]) for n in frames]
    tokens = module([torch.randn(n, 6) for n in frames], lengths)
    return int(module.token_counts(lengths)), len(tokens)


@pytest.mark.parametrize("connector", CONNECTORS, ids=lambda connector: f"{connector.kind}-{connector.summary_stride}")
@pytest.mark.parametrize("encoder", GRIDS)
def test_the_count_is_the_number_of_tokens_that_the_module_returns(connector: Connector, encoder: str) -> None:
    for seconds in SECONDS:
        frames = [frames_of(encoder, seconds)]
        counted = count_audio_tokens(connector, [GRIDS[encoder]], frames)
        assert tokens_of_module(connector, (encoder,), frames) == (counted, counted), seconds


@pytest.mark.parametrize(
    "encoders", [("sslam", "clap"), ("clap", "sslam"), ("pooled", "clap"), ("clap", "pooled", "sslam")]
)
def test_encoders_of_different_frame_rates_share_one_count(encoders: tuple[str, ...]) -> None:
    for seconds in SECONDS:
        frames = [frames_of(encoder, seconds) for encoder in encoders]
        counted = count_audio_tokens(LFST, [GRIDS[encoder] for encoder in encoders], frames)
        assert tokens_of_module(LFST, encoders, frames) == (counted, counted), seconds


@pytest.mark.parametrize(
    ("encoder", "windows", "tokens"), [("sslam", 1, 96), ("pooled", 3, 288), ("clap", 3, 288), ("clap", 12, 1152)]
)
def test_every_whole_window_of_every_encoder_is_96_tokens(encoder: str, windows: int, tokens: int) -> None:
    steps, bands = GRIDS[encoder]
    assert count_audio_tokens(LFST, [GRIDS[encoder]], [windows * steps * bands]) == tokens


def model_of(encoders: tuple[str, ...], integration: Any) -> PalForCausalLM:
    layers = () if integration == "plits" else (0, 2)
    streams = [Stream(encoders, integration, LFST, layers)]
    grids = {name: GRIDS[name] for name in encoders}
    return PalForCausalLM(
        PalConfig(language_model_config(), streams, dict.fromkeys(encoders, 6), AUDIO_TOKEN, encoder_grids=grids)
    )


@pytest.mark.parametrize("encoders", [("clap",), ("pooled", "clap")])
def test_plans_and_metrics_count_what_the_model_makes(encoders: tuple[str, ...]) -> None:
    frames = {name: frames_of(name, 31.0) for name in encoders}
    model = model_of(encoders, "plits")
    features = {name: torch.randn(n, 6) for name, n in frames.items()}
    lengths = {name: torch.tensor([n]) for name, n in frames.items()}
    made = int(model.audio_kv(features, lengths).audio.counts[0])
    row = RowShape(system_tokens=1, question_tokens=[3], loss_tokens=2, frames=frames)
    shape = sequence_shape(model.config, row)
    assert shape.token_counts == (made,) and shape.length == 1 + made + 3

    ids = torch.tensor([[5, AUDIO_TOKEN, 7, 8, 9]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([[-100, -100, -100, 8, 9]]),
        "segment_ids": torch.zeros_like(ids),
        "audio_lengths": lengths,
    }
    assert step_flops(model.config, [batch], "all") == training_flops(model.config, row, "all")
    plain = activation_bytes(model.config, RowShape(1 + made, [3], 2, {}), Execution(element_bytes=4))
    assert activation_bytes(model.config, row, Execution(element_bytes=4)).saved > plain.saved


@pytest.mark.parametrize("encoders", [("clap",), ("pooled", "clap"), ("clap", "sslam")])
def test_the_memory_bound_counts_what_the_model_makes(encoders: tuple[str, ...], tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    model = {"language_model": str(tmp_path), "integration": "plits", "encoders": list(encoders)}
    config = validate_config(
        ExperimentConfig,
        {
            "output": "unused",
            "model": {**model, "connector": {"kind": "lfst"}},
            "data": {"train": "unused"},
            "train": {"steps": 1},
        },
        "a test",
    )
    contracts = {
        name: EncoderContract(
            kind=name,
            revision="1",
            sample_rate_hz=16000,
            frame_rate_hz=GRIDS[name][0] * GRIDS[name][1] / WINDOW_S[name],
            width=6,
            grid=GRIDS[name],
        )
        for name in encoders
    }
    contract = FeatureContract(
        encoders=contracts, clips=1, questions=1, rejected=0, audio_hours=1.0, manifest_sha256="0" * 64
    )
    positions = audio_positions(config, contract)
    for seconds in SECONDS:
        counted, returned = tokens_of_module(LFST, encoders, [frames_of(name, seconds) for name in encoders])
        assert positions(seconds) == counted == returned, seconds
