"""Tests of invariants that every integration satisfies, whatever its weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.core.streams import Connector
from pipeline.model import PalForCausalLM, set_trainable
from pipeline.model.layout import Layout, TextBatch
from tests.helpers.small_models import AUDIO_TOKEN, FAMILIES, FRAMES, PRESETS, ROWS, Batch, batch, build

A = AUDIO_TOKEN
# Float32 sums in another order: a few units in the last place of logits of about 1.
CLOSE = {"rtol": 1e-4, "atol": 3e-6}


def logits(model: PalForCausalLM, given: Batch) -> Tensor:
    with torch.no_grad():
        return model(**given.arguments(labels=False)).logits


def stock(model: PalForCausalLM) -> transformers.PreTrainedModel:
    """The language model by itself, with transformers' own attention."""
    config = copy.deepcopy(model.language_model.config)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(model.language_model.state_dict())
    return plain


def gradients(model: PalForCausalLM, given: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**given.arguments()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3Text"])
def test_padding_order_and_neighbours_change_nothing(preset: str, family: str) -> None:
    model = build(preset, family)
    whole = logits(model, batch(ROWS, FRAMES))
    padded = logits(model, batch(ROWS, FRAMES, pad_to=15))
    left = logits(model, batch(ROWS, FRAMES, pad_to=15, left=True))
    clips = iter(range(len(FRAMES)))
    for b, row in enumerate(ROWS):
        torch.testing.assert_close(padded[b, : len(row)], whole[b, : len(row)], **CLOSE)
        torch.testing.assert_close(left[b, 15 - len(row) :], whole[b, : len(row)], **CLOSE)
        row_clips = [next(clips) for token in row if token == A]
        alone = batch([row], [FRAMES[c] for c in row_clips])
        for name, features in batch(ROWS, FRAMES).audio_features.items():
            alone.audio_features[name] = torch.cat([features[:0], *(features.split(FRAMES)[c] for c in row_clips)])
        torch.testing.assert_close(logits(model, alone)[0], whole[b, : len(row)], **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
def test_order_of_rows_changes_nothing(preset: str) -> None:
    model = build(preset)
    given = batch(ROWS, FRAMES)
    turned = batch([ROWS[2], ROWS[1], ROWS[0]], FRAMES)
    for name, features in given.audio_features.items():
        parts = features.split(FRAMES)
        turned.audio_features[name] = torch.cat([parts[1], parts[2], parts[0]])
        turned.audio_lengths[name] = torch.tensor([FRAMES[1], FRAMES[2], FRAMES[0]])
    torch.testing.assert_close(logits(model, turned).flip(0), logits(model, given), rtol=1e-4, atol=5e-6, msg=None)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_audio_it_is_the_plain_language_model(preset: str, family: str) -> None:
    model = build(preset, family, open_gates=preset != "flamingo")
    given = batch([ROWS[2], ROWS[2][:3]], [])
    plain = stock(model)
    with torch.no_grad():
        expected = plain(input_ids=given.input_ids, attention_mask=given.attention_mask).logits
    actual = logits(model, given)
    torch.testing.assert_close(actual[0], expected[0], **CLOSE)
    torch.testing.assert_close(actual[1, :3], expected[1, :3], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_plits_is_the_stock_model_on_the_same_embeddings(family: str) -> None:
    model = build("plits", family)
    given = batch(ROWS[:1], FRAMES[:1])
    with torch.no_grad():
        text = TextBatch(given.input_ids, given.attention_mask)
        embeds = model.prepare_forward(text, given.audio_features, given.audio_lengths).embeddings
        expected = stock(model)(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2])).logits
    text = [0, 1, *range(2 + FRAMES[0], embeds.shape[1])]
    columns = [i for i, token in enumerate(ROWS[0]) if token != A]
    torch.testing.assert_close(logits(model, given)[0, columns], expected[0, text], **CLOSE)


@pytest.mark.parametrize("preset", ["lal", "pal_v2", "pal_v3", "delayed"])
def test_hidden_audio_keys_leave_the_plain_model(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every LAL key masked, the text computes what it would at the same positions without LAL."""
    model = build(preset)
    given = batch(ROWS, FRAMES)
    visible = logits(model, given)

    def mask_keys(layout: Layout) -> Layout:
        return replace(layout, audio_layouts={key: audio.hide() for key, audio in layout.audio_layouts.items()})

    original = PalForCausalLM.layout
    monkeypatch.setattr(PalForCausalLM, "layout", lambda *a, **k: mask_keys(original(*a, **k)))
    hidden = logits(model, given)
    changed = batch(ROWS, FRAMES, seed=7)
    if preset in ("lal", "delayed"):  # the clips have no influence
        assert torch.equal(logits(model, changed), hidden)
    assert not torch.allclose(visible[0], hidden[0], atol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("audio_queries", [False, True])
def test_checkpointing_changes_nothing(preset: str, audio_queries: bool) -> None:
    model = build(preset, "Qwen3", audio_queries=audio_queries).train()
    given = batch(ROWS, FRAMES)
    loss, expected = gradients(model, given)
    model.gradient_checkpointing_enable()
    loss_again, grads = gradients(model, given)
    assert torch.equal(loss, loss_again)
    assert grads.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_questions_equal_separate_rows(preset: str) -> None:
    model = build(preset, "Gemma3Text" if preset == "pal_v3" else "Llama")
    system, questions = [5, 6, A], [[7, 8, 9, 10], [11, 12], [13, 14, 15]]
    packed = batch([system + [token for q in questions for token in q]], FRAMES[:1])
    packed.segment_ids = torch.tensor([[0] * 3 + [s + 1 for s, q in enumerate(questions) for _ in q]])
    packed.labels = torch.where(packed.segment_ids > 0, packed.input_ids, -100)
    separate = batch([system + q for q in questions], [FRAMES[0]] * 3)
    for name, features in packed.audio_features.items():
        separate.audio_features[name] = features.repeat(3, 1)
    separate.labels = torch.where(separate.attention_mask.bool(), separate.input_ids, -100)
    separate.labels[:, :3] = -100
    loss, grads = gradients(model, packed)
    loss_separate, expected = gradients(model, separate)
    torch.testing.assert_close(loss, loss_separate, rtol=1e-6, atol=1e-6)
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_text_only_batches_give_every_parameter_a_gradient(preset: str) -> None:
    model = build(preset).train()
    _, grads = gradients(model, batch([ROWS[2]], []))
    assert grads.keys() == dict(model.named_parameters()).keys()
    nonzero = [
        n for n, g in grads.items() if n.startswith("streams.") and "layer_blocks" not in n and g.abs().max() > 0
    ]
    assert nonzero == []


@pytest.mark.parametrize("trainable", ["connector", "all_but_ffn", "all"])
def test_frozen_parameters_get_no_gradient_and_do_not_move(trainable: str) -> None:
    model = build("pal_v3").train()
    set_trainable(model, trainable)  # type: ignore[arg-type]
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    _, grads = gradients(model, batch(ROWS, FRAMES))
    optimizer.step()
    frozen = {name for name in initial if name not in grads}
    assert {name for name, p in model.named_parameters() if torch.equal(p, initial[name])} == frozen
    language_model = {name for name in initial if name.startswith("language_model.")}
    ffn = {name for name in language_model if ".mlp." in name}
    assert frozen == {"connector": language_model, "all_but_ffn": ffn, "all": set()}[trainable]


def test_same_seed_gives_shared_values_to_same_parameters() -> None:
    models = {preset: build(preset, open_gates=False) for preset in ("lal", "pal_v3", "delayed")}
    shared = dict(models["lal"].named_parameters())
    for other in ("pal_v3", "delayed"):
        common = [(n, p) for n, p in models[other].named_parameters() if n in shared and p.shape == shared[n].shape]
        assert any(n.startswith("streams.0.layer_projections") for n, _ in common)
        assert all(torch.equal(p, shared[n]) for n, p in common)
    assert not torch.equal(*(models["lal"].streams[0].layer_projections[i].input.weight for i in ("0", "1")))


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "qformer", "lfst"])
@pytest.mark.parametrize("preset", ["plits", "lal", "flamingo"])
def test_every_connector_with_clips_of_unequal_length(kind: str, preset: str) -> None:
    small = {"num_queries": 3, "num_layers": 2, "num_heads": 2, "hidden_size": 8}
    sizes = small if kind in ("qformer", "lfst") else {"summary_stride": 3} if kind == "conv" else {}
    model = build(preset, connector=Connector(kind, **sizes), encoder_grids={"one": (4, 2)})  # type: ignore[arg-type]
    together = batch([[3, A, 4, 5, 6], [A, 7, 8, 9]], [6, 10])
    both = logits(model, together)
    first = batch([[3, A, 4, 5, 6]], [6])
    torch.testing.assert_close(logits(model, first)[0], both[0], **CLOSE)
    loss, grads = gradients(model, together)
    assert torch.isfinite(loss)
    assert grads.keys() == dict(model.named_parameters()).keys()
    changed = batch([[3, A, 4, 5, 6], [A, 7, 8, 9]], [6, 10], seed=3)
    assert not torch.allclose(logits(model, changed)[0, 1:], both[0, 1:], atol=1e-5)


def test_system_text_before_a_clip_attends_to_it_only_if_configured() -> None:
    for preset in ("plits", "lal", "pal_v3", "flamingo"):
        for sees_audio in (False, True):
            model = build(preset, system_text_sees_audio=sees_audio)
            one, other = (logits(model, batch(ROWS[:1], FRAMES[:1], seed=seed)) for seed in (0, 1))
            assert torch.allclose(one[0, :2], other[0, :2], atol=1e-6) is not sees_audio
            assert not torch.allclose(one[0, 3:], other[0, 3:], atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3Text"])
@pytest.mark.parametrize("preset", ["plits", "lal", "pal_v3"])
def test_flex_attention_equals_sdpa(preset: str, family: str, device: str) -> None:
    """FlexAttention has no backward pass on the CPU: gradients are compared with SDPA's on a GPU only."""
    model = build(preset, family).to(device)
    given = batch(ROWS, FRAMES)
    given.segment_ids = torch.zeros_like(given.input_ids)
    given.segment_ids[1, 5:7], given.segment_ids[1, 7:] = 1, 2
    given = given.to(device)
    results = {}
    for path in ("sdpa", "flex"):
        model.attention_path = path
        results[path] = [logits(model, given)]
        if device == "cuda":
            loss, grads = gradients(model, given)
            results[path] += [loss, *grads.values()]
    valid = given.attention_mask.bool()
    torch.testing.assert_close(results["flex"][0][valid], results["sdpa"][0][valid], **CLOSE)
    for one, other in zip(results["flex"][1:], results["sdpa"][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
