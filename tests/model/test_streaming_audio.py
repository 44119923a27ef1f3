"""Audio that arrives window by window is heard as if it had been there from the start, and forgotten without trace."""

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
    out = model.generate(
        QUESTION,
        prefix=prefix,
        prefix_rows=torch.tensor([0]),
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return out.sequences, torch.stack(out.logits)


def whole(model: PalForCausalLM, features: Tensor) -> PrefixCache:
    return model.read_prefix(PROMPT, None, {"one": features}, {"one": torch.tensor([len(features)])})


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Qwen3"])
def test_what_is_kept_is_heard_as_a_clip_of_its_own(family: str) -> None:
    model = build("lal", family, system_text_sees_audio=family == "Qwen3")
    features = batch([[AUDIO_TOKEN]], [sum(WINDOWS)]).audio_features["one"]
    live = StreamingAudio(model, {"one": 12})
    kept = [5, 6, 8, 12]  # newest frames, in whole windows, after each window
    end = 0
    for window, newest in zip(WINDOWS, kept, strict=True):
        end += window
        live.push("one", features[end - window : end])
        tokens, logits = answer(model, model.prefix_of(PROMPT, None, live))
        expected_tokens, expected_logits = answer(model, whole(model, features[end - newest : end]))
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
        assert live.nbytes == LAYERS * newest * 2 * 2 * 8 * 4, "2 x kv heads x head_dim x 4 bytes, a layer and token"


def test_streams_of_several_encoders_arrive_each_in_its_own_windows() -> None:
    model = build("lal")
    two = PalForCausalLM(
        type(model.config)(model.config.language_model_config, _two_streams(), WIDTHS, AUDIO_TOKEN)
    ).eval()
    given = batch([[AUDIO_TOKEN]], [9])
    live = StreamingAudio(two, dict.fromkeys(WIDTHS, 100))
    for name, cuts in (("one", [4, 5]), ("two", [2, 3, 4])):
        for features in given.audio_features[name].split(cuts):
            live.push(name, features)
    expected = two.read_prefix(PROMPT, None, given.audio_features, given.audio_lengths)
    torch.testing.assert_close(
        answer(two, two.prefix_of(PROMPT, None, live))[1], answer(two, expected)[1], rtol=0, atol=1e-5
    )


def _two_streams() -> Any:
    from pipeline.core.streams import preset_streams

    return preset_streams("lal", ["one", "two"], LAYERS, connector=Connector())


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ({"preset": "plits"}, "puts audio into plits"),
        ({"preset": "pal_v3"}, "puts audio into plits"),
        ({"preset": "flamingo"}, "puts audio into flamingo"),
        ({"connector": Connector(kind="qformer", hidden_size=12, num_heads=2, num_layers=1)}, "reads clips as a whole"),
        ({"audio_queries": True}, "lets audio query earlier audio"),
    ],
)
def test_models_that_cannot_hear_bit_by_bit_are_refused(model: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        StreamingAudio(build(**model), {"one": 10})
