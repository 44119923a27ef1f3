"""Tests that compiled feed-forward layers give the same losses and gradients, under the same parameter names."""

from __future__ import annotations

import pytest
import torch

from pipeline.model import PalForCausalLM
from tests.helpers.small_models import FAMILIES, FRAMES, ROWS, batch, build


def step(
    model: PalForCausalLM, rows: list[list[int]], frames: list[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch(rows, frames).arguments()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_give_the_same_losses_and_gradients(family: str) -> None:
    plain, compiled = build("pal_v3", family), build("pal_v3", family)
    compiled.compile_feed_forward()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for rows, frames in ((ROWS, FRAMES), (ROWS[:1], FRAMES[:1]), (ROWS[1:], FRAMES[1:])):
        (loss, gradients), (expected, expected_gradients) = step(compiled, rows, frames), step(plain, rows, frames)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
