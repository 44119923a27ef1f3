"""Tests that streaming audio gives the same answers as a finished clip of the windows that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector
from pipeline.model import PalForCausalLM, PrefixCache, StreamingAudio
from tests.helpers.small_models import AUDIO_TOKEN, LAYERS, WIDTHS, batch, build

PROMPT, QUESTION = torch.tensor([[5, 6, AUDIO_TOKEN]]), torch.tensor([[7, 8, 9]])
WINDOWS = (5, 1, 7, 4)


def answer(model: PalForCausalLM, prefix: PrefixCache) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    out = model.generate_from_prefix(
        prefix,
        torch.tensor([0]),
        QUESTION,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return out.sequences, torch.stack(out.logits)


def whole(model: PalForCausalLM, features: Tensor) -> PrefixCache:
    return model.prefill(PROMPT, None, {"one": features}, {"one": torch.tensor([len(features)])})


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Qwen3"])
def test_kept_windows_equal_a_clip_of_these_windows(family: str) -> None:
    model = build("lal", family, system_text_sees_audio=family == "Qwen3")
    features = batch([[AUDIO_TOKEN]], [sum(WINDOWS)]).audio_features["one"]
    streaming = StreamingAudio(model, {"one": 12})
    kept_frames = [5, 6, 8, 12]  # newest frames, in whole windows, after each window
    end = 0
    for window, newest in zip(WINDOWS, kept_frames, strict=True):
        end += window
        streaming.push("one", features[end - window : end])
        tokens, logits = answer(model, model.prefill_audio_kv(PROMPT, None, streaming))
        expected_tokens, expected_logits = answer(model, whole(model, features[end - newest : end]))
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
        assert streaming.nbytes == LAYERS * newest * 2 * 2 * 8 * 4, (
            "2 x kv heads x head_dim x 4 bytes for each layer and token"
        )


def test_each_encoder_may_have_windows_of_its_own_length() -> None:
    model = build("lal")
    two = PalForCausalLM(
        type(model.config)(model.config.language_model_config, _two_streams(), WIDTHS, AUDIO_TOKEN)
    ).eval()
    given = batch([[AUDIO_TOKEN]], [9])
    streaming = StreamingAudio(two, dict.fromkeys(WIDTHS, 100))
    for name, window_lengths in (("one", [4, 5]), ("two", [2, 3, 4])):
        for features in given.audio_features[name].split(window_lengths):
            streaming.push(name, features)
    expected = two.prefill(PROMPT, None, given.audio_features, given.audio_lengths)
    torch.testing.assert_close(
        answer(two, two.prefill_audio_kv(PROMPT, None, streaming))[1], answer(two, expected)[1], rtol=0, atol=1e-5
    )


def _two_streams() -> Any:
    from pipeline.core.streams import preset_streams

    return preset_streams("lal", ["one", "two"], LAYERS, connector=Connector())


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ({"preset": "plits"}, "integrates audio by plits"),
        ({"preset": "pal_v3"}, "integrates audio by plits"),
        ({"preset": "flamingo"}, "integrates audio by flamingo"),
        ({"connector": Connector(kind="qformer", hidden_size=12, num_heads=2, num_layers=1)}, "reads clips as a whole"),
        ({"audio_queries": True}, "lets audio attend to earlier audio"),
    ],
)
def test_models_that_cannot_encode_streaming_audio_are_refused(model: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        StreamingAudio(build(**model), {"one": 10})
