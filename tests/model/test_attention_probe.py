"""Tests that the probed attention weights are those that the model computes with, and that they sum to 1."""

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.model import probe_attention
from pipeline.model.attention_ops import attend, attention_weights
from tests.helpers.small_models import AUDIO_TOKEN, LAYERS, batch, build


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_weights_reproduce_attend(causal: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    query, text, audio = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 5, 8), torch.randn(2, 1, 2, 3, 8)
    blocks = [(text[0], text[1])] if causal else [(audio[0], audio[1]), (text[0], text[1])]
    mask = None if causal else torch.zeros(2, 1, 5, 8).masked_fill(torch.rand(2, 1, 5, 8) < 0.3, -torch.inf)
    weights = attention_weights(query, blocks, mask, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    values = torch.cat([v.expand(2, -1, -1, -1) for _, v in blocks], dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(weights @ values, attend(query, blocks, mask, scaling=0.3, softcap=softcap))


@pytest.mark.parametrize("preset", ["plits", "lal", "pal_v2", "pal_v3", "delayed"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_shares_of_every_layer_and_head_sum_to_one(preset: str, family: str) -> None:
    model = build(preset, family)
    given = batch([[5, 6, AUDIO_TOKEN, 7, 8, 9, 10]], [9])
    attention = probe_attention(model, given.input_ids, given.labels, given.audio_features, given.audio_lengths)
    assert attention.mass.shape == (LAYERS, 4, 3)
    torch.testing.assert_close(attention.mass.sum(-1), torch.ones(LAYERS, 4))
    kinds = {spec.integration for spec in model.specs}
    for number, kind in enumerate(("lal", "plits"), start=1):
        tokens = [
            t.sum(1) for spec, t in zip(model.specs, attention.token_weights, strict=True) if spec.integration == kind
        ]
        total = torch.stack(tokens).sum(0) if tokens else torch.zeros(LAYERS)
        torch.testing.assert_close(total, attention.mass[:, :, number].mean(1))
        layers = {n for spec in model.specs if spec.integration == kind for n in spec.audio_layers or range(LAYERS)}
        assert {n for n in range(LAYERS) if attention.mass[n, :, number].min() > 0} == (
            layers if kind in kinds else set()
        )


def test_flamingo_streams_are_refused() -> None:
    given = batch([[5, AUDIO_TOKEN, 7, 8]], [4])
    with pytest.raises(UserError, match="flamingo"):
        probe_attention(build("flamingo"), given.input_ids, given.labels, given.audio_features, given.audio_lengths)
