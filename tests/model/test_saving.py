"""Tests of saving, loading, pretrained language models, adapters, and the errors for invalid input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector, Stream, preset_streams
from pipeline.model import PalConfig, PalForCausalLM, add_lora, count_parameters, merge_lora, set_trainable
from tests.helpers.small_models import (
    AUDIO_TOKEN,
    FAMILIES,
    FRAMES,
    LAYERS,
    PRESETS,
    ROWS,
    WIDTHS,
    batch,
    build,
    language_model_config,
)


def logits(model: PalForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(ROWS, FRAMES).arguments(labels=False)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_saved_and_loaded_is_the_same_model(preset: str, tied: bool, tmp_path: Path) -> None:
    model = build(preset, language_model={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    for loaded in (PalForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded, PalForCausalLM)
        assert torch.equal(logits(loaded.eval()), logits(model))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, PalConfig)
    assert config.stream_specs() == model.specs
    weights = model.get_output_embeddings().weight
    assert (weights is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_language_model_keeps_its_weights(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(language_model_config(family)).eval()
    plain.save_pretrained(tmp_path)
    config = PalConfig(
        AutoConfig.from_pretrained(tmp_path),
        streams=preset_streams("pal_v3", ["one"], LAYERS, connector=Connector()),
        encoder_widths=WIDTHS,
        audio_token_id=AUDIO_TOKEN,
        base_language_model=str(tmp_path),
    )
    model = PalForCausalLM.from_language_model(config, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.base_language_model == str(tmp_path)
    loaded = model.language_model.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(loaded[name], weight.to(torch.bfloat16)), name


def test_adapters_train_alone_are_saved_and_can_be_merged(tmp_path: Path) -> None:
    model = build("lal")
    unadapted = logits(model)
    total = count_parameters(model)["total"]
    add_lora(model, rank=2, alpha=4, target_modules=["q_proj", "k_proj", "v_proj"])
    assert torch.equal(logits(model), unadapted)
    set_trainable(model, "connector")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("language_model.")}
    assert len(trained) == 2 * 3 * LAYERS
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)
    adapted = logits(model)
    assert not torch.allclose(adapted, unadapted, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PalForCausalLM.from_pretrained(tmp_path).eval()), adapted)
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert count_parameters(model)["total"] == total
    assert model.config.lora is None


def test_adapters_of_layers_that_do_not_exist_raise_a_user_error() -> None:
    with pytest.raises(UserError, match="no layer is named"):
        add_lora(build("lal"), rank=2, alpha=4, target_modules=["absent"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([[5, 6, 7, 8]])}, "hold 0 audio placeholders"),
        ({"input_ids": torch.tensor([[5, AUDIO_TOKEN, AUDIO_TOKEN, 8]])}, "hold 2 audio placeholders"),
        ({"audio_features": {"one": torch.zeros(4, 21)}}, "has shape"),
        ({"audio_features": {"one": torch.full((4, 20), torch.nan)}}, "holds NaN"),
        ({"audio_features": {"one": torch.full((4, 20), torch.inf)}}, "holds NaN or infinite"),
        ({"audio_features": {"two": torch.zeros(4, 12)}}, "is absent"),
        ({"audio_features": {"one": torch.zeros(0, 20)}, "audio_lengths": {"one": torch.tensor([0])}}, "is empty"),
        ({"audio_lengths": {"one": torch.tensor([3])}}, "lengths that sum to 3"),
    ],
)
@pytest.mark.parametrize("preset", ["plits", "lal"])
def test_invalid_input_raises_a_user_error(preset: str, change: dict[str, Any], message: str) -> None:
    model = build(preset)
    valid_input: dict[str, Any] = {
        "input_ids": torch.tensor([[5, AUDIO_TOKEN, 7, 8]]),
        "audio_features": {"one": torch.zeros(4, 20)},
        "audio_lengths": {"one": torch.tensor([4])},
    }
    model(**valid_input)
    with pytest.raises(UserError, match=message):
        model(**(valid_input | change))


def test_invalid_models_raise_a_user_error() -> None:
    stream = Stream(("one",), "lal", audio_layers=(LAYERS,))
    with pytest.raises(UserError, match="audio_layers"):
        PalForCausalLM(PalConfig(language_model_config(), [stream], WIDTHS, AUDIO_TOKEN))
    plits = [Stream(("one",), "plits")]
    with pytest.raises(UserError, match="family 'gpt2' is not supported"):
        PalForCausalLM(PalConfig(GPT2Config(), plits, WIDTHS, AUDIO_TOKEN))
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(UserError, match="'dynamic' rope"):
        PalForCausalLM(PalConfig(language_model_config("Llama", **dynamic), plits, WIDTHS, AUDIO_TOKEN))
    with pytest.raises(UserError, match="no width for encoder"):
        PalForCausalLM(PalConfig(language_model_config(), plits, {}, AUDIO_TOKEN))
    with pytest.raises(UserError, match="language model's width"):
        PalForCausalLM(
            PalConfig(language_model_config(), [Stream(("one",), "plits", Connector(width=7))], WIDTHS, AUDIO_TOKEN)
        )
    with pytest.raises(UserError, match="lfst reads encoders whose output is a grid"):
        PalForCausalLM(
            PalConfig(language_model_config(), [Stream(("one",), "plits", Connector("lfst"))], WIDTHS, AUDIO_TOKEN)
        )
