"""Compares the oracle without audio with the stock model of every family: logits and the gradient of every weight."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import model as oracle
from tests.parity.families import FAMILIES, VOCABULARY, oracle_language_model, stock_model
from tests.parity.float64 import lifted_to_float64

IDS = [int(i) for i in torch.randint(3, VOCABULARY, (11,), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_equals_the_stock_model(family: str) -> None:
    with lifted_to_float64():
        model = stock_model(family)
        logits = model(torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS))).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]), reduction="sum")
        loss.backward()

    weights = {
        f"language_model.{name}": parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    method = oracle.Method(oracle_language_model(family), streams=())
    conversation, expected = oracle.run(method, weights, IDS)
    assert (logits - torch.stack(expected)).abs().max() < 1e-10

    oracle.loss_sum(conversation, expected, [-100, *IDS[1:]]).backward()
    for name, parameter in model.named_parameters():
        expected_gradient = weights[f"language_model.{name}"].grad
        assert expected_gradient is not None, name
        assert expected_gradient.abs().max() > 0, name
        assert (parameter.grad - expected_gradient).abs().max() < 1e-10, name
