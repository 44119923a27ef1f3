"""Tests of adapters in training: dropout and what the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model import PalForCausalLM, add_lora, audio_kv
from tests.helpers.small_models import FRAMES, ROWS, batch, build


def gradients(model: PalForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(**batch(ROWS, FRAMES).arguments()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["lal", "pal_v3"])
def test_dropout_of_adapters_is_the_same_in_what_the_backward_pass_recomputes(
    preset: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build(preset)
    add_lora(model, rank=2, alpha=4, dropout=0.3, target_modules=["q_proj", "k_proj", "v_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins at zero, where dropout changes nothing
            torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    recomputed = gradients(model)

    def keep_everything(function: Callable[..., Any], *inputs: Tensor, draws: bool = False) -> Any:
        return function(*inputs)

    model.gradient_checkpointing_disable()
    monkeypatch.setattr(audio_kv, "recompute", keep_everything)
    kept = gradients(model)
    assert recomputed.keys() == kept.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
