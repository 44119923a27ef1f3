"""Tests that no step waits for the device and none mixes host and device tensors; on a stand-in for the device."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from transformers import DynamicCache

from pipeline.model import PalConfig, PalForCausalLM, add_lora
from pipeline.model.generation import Decoding
from tests.helpers.fake_cuda import DeviceName, device_arguments, device_model, device_stand_in
from tests.helpers.small_models import AUDIO_TOKEN, Batch, batch, build, language_model_config

A = AUDIO_TOKEN
PRESETS = ("text_only", "plits", "lal", "pal_v2", "pal_v3", "flamingo")
BATCHES = ("one_question", "packed", "uneven", "text_only_batch")


def make_model(preset: str) -> PalForCausalLM:
    if preset == "text_only":
        return PalForCausalLM(PalConfig(language_model_config(), (), {}, AUDIO_TOKEN))
    return build(preset)  # type: ignore[arg-type]


def make_batch(name: str, preset: str) -> Batch:
    if name == "packed":
        rows = batch([[5, 6, A, 7, 8, 9, 10, 11, 12], [5, 6, A, 7, 8, 9, 10]], [5, 3])
        rows.segment_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 2, 2, 0, 0]])
    elif name == "uneven":
        rows = batch([[5, 6, A, 7, 8, 9, 10], [11, A, 12, 13, A, 14, 15, 16, 17], [18, 19, 20, 21]], [5, 9, 2])
    elif name == "text_only_batch":
        rows = batch([[5, 6, 7, 8], [9, 10, 11, 12, 13]], [])
    else:
        rows = batch([[5, 6, A, 7, 8, 9, 10]] * 2, [6, 6])
    if preset == "text_only":
        rows.input_ids[rows.input_ids == A] = 3
        rows.audio_features, rows.audio_lengths = {}, {}
    return rows


@pytest.mark.parametrize(
    ("device", "variant"),
    [("cuda:0", "plain"), ("cuda:0", "sdpa"), ("meta", "plain"), ("meta", "checkpointing"), ("meta", "lora")],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_step_neither_waits_nor_mixes_devices(device: DeviceName, preset: str, variant: str) -> None:
    model = make_model(preset).train()
    if variant == "lora":
        add_lora(model, rank=2, alpha=4, dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"])
    if variant == "checkpointing":
        model.gradient_checkpointing_enable()
    if variant == "sdpa":
        model.attention_path = "sdpa"
    fake = device_model(model, device)
    for name in BATCHES:
        arguments = device_arguments(make_batch(name, preset), device, fake)
        with device_stand_in(device, fake) as recorder:
            loss = model(**arguments).loss
            if device == "meta":
                loss.backward()
        assert loss.device == torch.device(device)
        assert recorder.findings == [], name


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Gemma3Text", "Olmo2"])
def test_no_family_waits_or_mixes_devices(family: str) -> None:
    preset = "pal_v3"  # with tokens in the sequence and beside it
    model = build("pal_v3", family).train()
    fake = device_model(model, "cuda:0")
    arguments = device_arguments(make_batch("uneven", preset), "cuda:0", fake)
    with device_stand_in("cuda:0", fake) as recorder:
        model(**arguments)
    assert recorder.findings == []


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "text_only"])
def test_prefill_and_decoding_steps_neither_wait_nor_mix_devices(preset: str) -> None:
    model = make_model(preset)
    fake = device_model(model, "cuda:0")
    prefix = batch([[5, 6, A], [7, A]], [5, 3])
    arguments = device_arguments(prefix, "cuda:0", fake, labels=False)
    with torch.no_grad(), device_stand_in("cuda:0", fake) as recorder:
        filled = model.prefill(**arguments)
        rows = torch.arange(2, device="cuda:0")
        decoding = Decoding(filled.attention_inputs, filled.next_position, filled, rows)
        cache = DynamicCache()
        token = torch.ones(2, 1, dtype=torch.long, device="cuda:0")
        logits = [model(token, past_key_values=cache, decoding=decoding).logits for _ in range(2)]
    assert [tuple(x.shape[:2]) for x in logits] == [(2, 1), (2, 1)]
    assert recorder.findings == []


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("wait", lambda x: x.sum().item()),
        ("wait", lambda x: x.tolist()),
        ("wait", lambda x: x.nonzero()),
        ("wait", lambda x: x[x > 0]),
        ("wait", lambda x: x.cpu()),
        ("wait", lambda x: torch.ones(2).to(x.device)),
        ("mix", lambda x: x[torch.zeros(1, dtype=torch.long)]),
        ("mix", lambda x: x + torch.ones(3)),
    ],
    ids=["item", "tolist", "nonzero", "boolean_index", "cpu", "pageable_copy", "host_index", "host_operand"],
)
def test_the_stand_in_records_each_kind_of_wait_and_mix(kind: str, operation: object) -> None:
    fake = device_model(make_model("text_only"), "cuda:0")
    with device_stand_in("cuda:0", fake) as recorder:
        x = torch.empty(3, device="cuda:0")
        with suppress(Exception):  # without numbers it may have no result
            operation(x)  # type: ignore[operator]
    assert {finding.kind for finding in recorder.findings} == {kind}
