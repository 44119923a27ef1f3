"""Tests that masked audio, and untrained flamingo blocks, leave the plain language model of transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.core.streams import Gain
from pipeline.model import PalForCausalLM
from tests.helpers.small_models import AUDIO_TOKEN, FAMILIES, FRAMES, ROWS, batch, build
from tests.parity.float64 import lifted_to_float64

ROUNDING = 1e-12  # float64; absent keys change the order of a sum, nothing else


def hide_audio_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks every key beside the sequence as padding; positions stay."""
    original = PalForCausalLM.layout

    def layout(*args: Any, **settings: Any) -> Any:
        visible = original(*args, **settings)
        hidden = {streams: audio.hide() for streams, audio in visible.audio_layouts.items()}
        return replace(visible, audio_layouts=hidden)

    monkeypatch.setattr(PalForCausalLM, "layout", layout)


def plain_logits(model: PalForCausalLM, text: list[int], positions: list[int]) -> Tensor:
    """Runs transformers' model on text at these positions, with explicit masks: it would take a gap for a boundary."""
    config = copy.deepcopy(model.language_model.config)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float64).eval()
    plain.load_state_dict(model.language_model.state_dict())
    position = torch.tensor(positions)
    distance = position[:, None] - position[None, :]

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)[None, None]

    window = getattr(config, "sliding_window", None) or 10**6
    full, sliding = additive(distance >= 0), additive((distance >= 0) & (distance < window))
    mask: Any = sliding if config.model_type == "mistral" else full
    if config.model_type.startswith("gemma"):
        mask = {"full_attention": full, "sliding_attention": sliding}
    with torch.no_grad():
        return plain(input_ids=torch.tensor([text]), position_ids=position[None], attention_mask=mask).logits[0]


@pytest.mark.parametrize("preset", ["lal", "delayed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_audio_leaves_the_plain_model_with_a_gap(
    family: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, frames = ROWS[0], FRAMES[0]
    clip = row.index(AUDIO_TOKEN)
    text = [token for token in row if token != AUDIO_TOKEN]
    gapped = [i + (frames if i >= clip else 0) for i in range(len(text))]
    columns = [i for i, token in enumerate(row) if token != AUDIO_TOKEN]
    with lifted_to_float64():
        model = build(preset, family).to(torch.float64)  # type: ignore[arg-type]
        given = batch([row], [frames])
        given.audio_features = {name: x.double() for name, x in given.audio_features.items()}
        expected = plain_logits(model, text, gapped)
        with torch.no_grad():
            visible = model(**given.arguments(labels=False)).logits[0, columns]
            hide_audio_keys(monkeypatch)
            hidden = model(**given.arguments(labels=False)).logits[0, columns]
        assert (hidden - expected).abs().max() < ROUNDING
        assert (visible - expected)[clip:].abs().max() > 1e-4
        assert (plain_logits(model, text, list(range(len(text)))) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("preset", ["plits", "lal", "pal_v2", "pal_v3"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_all_pathways_hidden_leave_the_plain_model_with_a_gap(family: str, preset: str) -> None:
    system, question, frames = [5, 6], [7, 8, 9], 7
    with lifted_to_float64():
        model = build(preset, family).to(torch.float64)  # type: ignore[arg-type]
        clip = batch([[*system, AUDIO_TOKEN]], [frames])
        audio = {name: x.double() for name, x in clip.audio_features.items()}

        def logits(*hidden: str) -> Tensor:
            prefix = model.prefill(clip.input_ids, None, audio, clip.audio_lengths, hidden=hidden)
            out = model.generate_from_prefix(
                prefix,
                torch.tensor([0]),
                torch.tensor([question]),
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
            begin = int(prefix.next_position)
            expected = plain_logits(model, system + question, [0, 1, *range(begin, begin + len(question))])[-1]
            return (out.logits[0][0] - expected).abs().max()

        assert logits("lal", "plits") < ROUNDING
        assert logits() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_flamingo_is_the_plain_model_to_the_last_bit(family: str) -> None:
    """Its gates are zero, and its audio takes no positions: text computes the same with and without clips."""
    flamingo = build("flamingo", family, open_gates=False)
    plain = PalForCausalLM(replace_streams(flamingo))
    plain.eval().language_model.load_state_dict(flamingo.language_model.state_dict())
    with_audio = batch(ROWS, FRAMES)
    text = [[token for token in row if token != AUDIO_TOKEN] for row in ROWS]
    without = batch(text, [])
    with torch.no_grad():
        with_clips = flamingo(**with_audio.arguments(labels=False)).logits
        expected = plain(without.input_ids, without.attention_mask).logits
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        answers = flamingo.generate(
            with_audio.input_ids, with_audio.attention_mask, with_audio.audio_features, with_audio.audio_lengths,
            **settings,
        )  # fmt: skip
        expected_answers = plain.generate(without.input_ids, without.attention_mask, **settings)
    for b, row in enumerate(ROWS):
        columns = [i for i, token in enumerate(row) if token != AUDIO_TOKEN]
        assert torch.equal(with_clips[b, columns], expected[b, : len(columns)])
    assert torch.equal(answers, expected_answers)


def replace_streams(model: PalForCausalLM) -> Any:
    config = copy.deepcopy(model.config)
    config.streams, config.encoder_widths = [], {}
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gain_begins_closer_to_the_plain_model_than_lal_as_published(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance is that of the logits, relative to their spread.

    What remains at a gain of 0.1 is mostly that audio keys, whose scores are then near zero, take attention from text.
    """
    rows = batch(ROWS, FRAMES)
    text = (rows.input_ids != AUDIO_TOKEN) & (rows.attention_mask > 0)
    models = {gain: build("lal", family, gain=gain, open_gates=False) for gain in (None, Gain(0.1))}
    with torch.no_grad():
        logits = {gain: model(**rows.arguments(labels=False)).logits[text] for gain, model in models.items()}
        hide_audio_keys(monkeypatch)
        plain = models[None](**rows.arguments(labels=False)).logits[text]
    spread = (plain - plain.mean(-1, keepdim=True)).norm()
    published, scaled = (float((x - plain).norm() / spread) for x in logits.values())
    assert scaled < 0.6
    assert scaled < 0.9 * published
