"""Figures that a shipped config repeats from the code agree with the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ClapConfig, ClapFeatureExtractor, WhisperConfig, WhisperFeatureExtractor

from data_prep.config import EncoderConfig, PrepareConfig
from data_prep.encoders.build import describe_encoder
from pipeline.config import load_config
from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.core.feature_contract import EncoderContract
from pipeline.training.throughput import peak_flops

WHISPER_LARGE_V3_WIDTH = 1280  # `d_model` of the published model
VIT_B_WIDTH = 768


def describe_without_weights(config: EncoderConfig, folder: Path) -> EncoderContract:
    """The contract of an encoder whose folder holds everything but weights of any meaning."""
    model = folder / config.kind
    model.mkdir()
    torch.save({"extra_tokens": torch.zeros(1, 1, VIT_B_WIDTH)}, model / "model.pt")
    if config.kind == "clap":  # the sizes of clap-htsat-unfused are transformers' defaults
        ClapConfig().save_pretrained(model)
        ClapFeatureExtractor().save_pretrained(model)
    elif config.kind == "whisper":
        WhisperConfig(d_model=WHISPER_LARGE_V3_WIDTH).save_pretrained(model)
        WhisperFeatureExtractor(feature_size=128).save_pretrained(model)
    return describe_encoder(config.model_copy(update={"model": str(model)}))


def test_the_workload_of_openaqa_has_the_features_that_its_recipe_prepares(tmp_path: Path) -> None:
    encoders = load_config(PrepareConfig, "openaqa_prepare").encoders
    workload = load_config(WorkloadConfig, "openaqa_workload")
    assert workload.encoders.keys() == encoders.keys()
    for name, encoder in encoders.items():
        contract, planned = describe_without_weights(encoder, tmp_path), workload.encoders[name]
        assert planned.frame_rate_hz == contract.frame_rate_hz, name
        assert (planned.width, planned.grid) == (contract.width, contract.grid), name


@pytest.mark.parametrize(
    ("cluster", "device"),
    [
        ("a100_40", "NVIDIA A100-SXM4-40GB"),
        ("a100_80", "NVIDIA A100-SXM4-80GB"),
        ("h100_80", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_plans_and_metrics_know_the_same_peak_of_a_device(
    cluster: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    planned = load_config(ClusterConfig, cluster).gpu.peak_tflops
    for precision in ("bf16", "fp16"):
        assert peak_flops(torch.device("cuda"), precision, None) == pytest.approx(planned[precision] * 1e12)
