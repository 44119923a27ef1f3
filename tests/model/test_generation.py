"""Tests that decoding with a cache equals the full forward pass, however prompts and clips are arranged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.model import PalForCausalLM, prefix_cache
from tests.helpers.small_models import AUDIO_TOKEN, FAMILIES, FRAMES, LAYERS, PRESETS, ROWS, Batch, batch, build

A = AUDIO_TOKEN
NEW = 6


def answers(model: PalForCausalLM, given: Batch, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | settings
    return model.generate(given.input_ids, given.attention_mask, given.audio_features, given.audio_lengths, **settings)


def full_forward(model: PalForCausalLM, row: list[int], clips: Batch) -> list[int]:
    """Greedy decoding of one row without any cache."""
    row = list(row)
    for _ in range(NEW):
        given = batch([row], [])
        with torch.no_grad():
            logits = model(
                given.input_ids, audio_features=clips.audio_features, audio_lengths=clips.audio_lengths
            ).logits
        logits[0, -1, 2] = -torch.inf  # min_new_tokens forbids the end token
        row.append(int(logits[0, -1].argmax()))
    return row[-NEW:]


def clips_of(given: Batch, indices: list[int]) -> Batch:
    picked = {name: x.split(given.audio_lengths[name].tolist()) for name, x in given.audio_features.items()}
    lengths = {name: n[indices] for name, n in given.audio_lengths.items()}
    features = {name: torch.cat([p[i] for i in indices]) if indices else p[0][:0] for name, p in picked.items()}
    return Batch(given.input_ids, given.attention_mask, given.labels, features, lengths)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_full_forward(preset: str, family: str) -> None:
    model = build(preset, family, audio_queries=family == "Qwen3")
    given = batch(ROWS, FRAMES)
    generated = answers(model, given).tolist()
    for row, clips, tokens in zip(ROWS, [[0], [1, 2], []], generated, strict=True):
        assert tokens == full_forward(model, row, clips_of(given, clips))


@pytest.mark.parametrize("preset", PRESETS)
def test_questions_about_encoded_clips_equal_fresh_ones(preset: str) -> None:
    model = build(preset)
    questions = [[5, 6, A, 7, 8], [5, 6, A, 9], [5, A, 10, 11, 12]]
    together = batch(questions, [9])
    shared = model.encode_audio(together.audio_features, together.audio_lengths)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    fresh = [answers(model, batch([q], [9]), **settings).tolist()[0] for q in questions]
    for rows in ([0, 1], [0, 1, 2]):  # the first two rows place the clip alike, the third does not
        given = batch([questions[i] for i in rows], [])
        generated = model.generate_from_audio_kv(given.input_ids, given.attention_mask, shared, **settings)
        assert generated.tolist() == [fresh[i] for i in rows]
    two = batch(ROWS[:1], [4, 6])
    encoded = model.encode_audio(two.audio_features, two.audio_lengths)
    for clip in (0, 1):
        generated = model.generate_from_audio_kv(two.input_ids, None, encoded, torch.tensor([clip]), **settings)
        assert torch.equal(generated, answers(model, clips_of(two, [clip]), **settings))


@pytest.mark.parametrize("preset", ["plits", "lal", "pal_v3", "flamingo"])
def test_beams_of_a_batch_equal_beams_of_each_row(preset: str) -> None:
    model = build(preset)
    given = batch(ROWS, FRAMES)
    together = answers(model, given, num_beams=3)
    for b, (row, clips) in enumerate(zip(ROWS, [[0], [1, 2], []], strict=True)):
        one = clips_of(given, clips)
        alone = batch([row], [])
        alone = Batch(alone.input_ids, alone.attention_mask, alone.labels, one.audio_features, one.audio_lengths)
        assert torch.equal(answers(model, alone, num_beams=3)[0], together[b])


def test_beam_scores_are_bounded_by_the_full_forward() -> None:
    """The score of the best beam is no more than the log-probability of its tokens in the full forward pass."""
    model = build("lal")
    given = batch(ROWS[:2], FRAMES)
    out = answers(model, given, num_beams=4, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    for b, (row, clips) in enumerate(zip(ROWS[:2], [[0], [1, 2]], strict=True)):
        tokens = out.sequences[b].tolist()
        one = clips_of(given, clips)
        with torch.no_grad():
            logits = model(
                torch.tensor([row + tokens]), audio_features=one.audio_features, audio_lengths=one.audio_lengths
            ).logits[0, len(row) - 1 : -1]
        logits[:, 2] = -torch.inf
        # min_new_tokens removes the end token after the softmax, so the plain log-probabilities are an upper bound
        total = sum(float(step[t]) for step, t in zip(logits.log_softmax(-1), tokens, strict=True))
        assert float(out.sequences_scores[b]) <= total + 1e-4


def test_sampling_is_reproducible_and_varies() -> None:
    model = build("lal")
    given = batch(ROWS, FRAMES)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(answers(model, given, do_sample=True, temperature=2.0).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_padding_side_of_prompts_does_not_matter() -> None:
    model = build("pal_v3")
    left, right = (batch(ROWS, FRAMES, left=side) for side in (True, False))
    assert torch.equal(answers(model, left), answers(model, right))


def test_audio_kv_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("lal")
    calls = []
    model.streams[0].layer_projections["0"].register_forward_hook(lambda *_: calls.append(1))
    answers(model, batch(ROWS, FRAMES))
    assert len(calls) == 1


def test_more_placeholders_than_encoded_clips_raise_a_user_error() -> None:
    model = build("lal")
    given = batch(ROWS, [4, 5])
    encoded = model.encode_audio(given.audio_features, given.audio_lengths)
    with pytest.raises(UserError, match="placeholders"):
        model.generate_from_audio_kv(given.input_ids, given.attention_mask, encoded)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_questions_behind_a_prefix_equal_whole_prompts(preset: str, family: str) -> None:
    """Prefixes of unequal length, several questions about one clip, questions of unequal length, and beams."""
    model = build(preset, family)
    prefixes, suffixes, rows = [[5, 6, A], [5, A]], [[7, 8], [9], [10, 11, 12], [13, 14]], [0, 1, 1, 0]
    clips, questions = batch(prefixes, FRAMES[:2]), batch(suffixes, [])
    prefix = model.prefill(clips.input_ids, clips.attention_mask, clips.audio_features, clips.audio_lengths)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    for beam_settings in ({}, {"num_beams": 3}):
        generated = model.generate_from_prefix(
            prefix,
            torch.tensor(rows),
            questions.input_ids,
            questions.attention_mask,
            **settings,
            **beam_settings,
        )
        for suffix, row, tokens in zip(suffixes, rows, generated, strict=True):
            one = clips_of(clips, [row])
            whole = batch([prefixes[row] + suffix], [])
            expected = answers(model, Batch(**{**one.__dict__, **_tokens_of(whole)}), **beam_settings)
            assert torch.equal(tokens, expected[0])


def _tokens_of(given: Batch) -> dict[str, Tensor]:
    return {"input_ids": given.input_ids, "attention_mask": given.attention_mask, "labels": given.labels}


@pytest.mark.parametrize("preset", PRESETS)
def test_hidden_audio_changes_nothing_and_visible_audio_does(preset: str) -> None:
    model = build(preset)
    clips = [batch([[5, 6, A]], [9], seed=seed) for seed in (0, 1)]
    kinds = {spec.integration for spec in model.specs}

    def logits(given: Batch, hidden: set[str]) -> Tensor:
        prefix = model.prefill(given.input_ids, None, given.audio_features, given.audio_lengths, hidden=hidden)
        out = model.generate_from_prefix(
            prefix,
            torch.tensor([0]),
            torch.tensor([[7, 8]]),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.logits[0]

    assert torch.equal(*(logits(given, kinds) for given in clips)), "hidden audio changes the logits"
    assert not torch.allclose(*(logits(given, set()) for given in clips))
    if len(kinds) > 1:
        partly = [logits(given, {kind}) for kind in sorted(kinds) for given in clips]
        assert not torch.allclose(partly[0], partly[1])
        assert not torch.allclose(partly[2], partly[3])


@pytest.mark.parametrize("preset", ["plits", "pal_v2", "pal_v3"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_a_long_prefix_is_prefilled_in_chunks(preset: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(preset, family)
    given = batch([[5, 6, A], [5, A]], [19, 30])

    def logits() -> Tensor:
        prefix = model.prefill(given.input_ids, given.attention_mask, given.audio_features, given.audio_lengths)
        settings: dict[str, Any] = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate_from_prefix(prefix, torch.arange(2), torch.tensor([[7], [8]]), **settings)
        return out.logits[0]

    whole = logits()
    passes: list[int] = []
    model.language_model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(prefix_cache, "CHUNK", 4)
    torch.testing.assert_close(logits(), whole, rtol=0, atol=1e-5)
    assert len(passes) > 3


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_of_a_prefix_is_linear_in_the_audio(preset: str) -> None:
    model = build(preset)

    def nbytes(frames: int) -> int:
        given = batch([[5, 6, A]], [frames])
        return model.prefill(given.input_ids, None, given.audio_features, given.audio_lengths).nbytes

    assert nbytes(60) - nbytes(30) == nbytes(90) - nbytes(60) > 0
    if preset == "lal":  # keys and values of each layer: kv heads x head_dim x 4 bytes, of audio and of two text tokens
        assert nbytes(30) == LAYERS * (30 + 2) * 2 * 2 * 8 * 4


def test_a_placeholder_behind_a_prefix_raises_a_user_error() -> None:
    model = build("lal")
    given = batch([[5, A]], [4])
    prefix = model.prefill(given.input_ids, None, given.audio_features, given.audio_lengths)
    with pytest.raises(UserError, match="behind a prefix"):
        model.generate_from_prefix(prefix, torch.tensor([0]), torch.tensor([[7, A]]), max_new_tokens=1)
