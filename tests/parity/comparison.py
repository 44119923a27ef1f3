"""Compares the model with the oracle: same weights, same conversations; logits, loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.core.streams import Stream
from pipeline.model import PalConfig, PalForCausalLM
from tests.oracle import model as oracle
from tests.oracle.connectors import Connector as OracleConnector
from tests.parity.batches import AUDIO_TOKEN, ENCODERS, GRIDS, IGNORE_INDEX, Row, collate, labels_of
from tests.parity.families import oracle_language_model, randomise, stock_config
from tests.parity.float64 import lifted_to_float64


@dataclass(frozen=True)
class Case:
    """A model to build: its family, its streams and its switches."""

    family: str
    streams: tuple[Stream, ...]
    switches: tuple[tuple[str, bool], ...] = ()

    @property
    def encoders(self) -> list[str]:
        return sorted({name for stream in self.streams for name in stream.encoders})


@dataclass
class Result:
    """One (tokens, vocabulary) tensor for each conversation; loss and gradients by parameter name."""

    logits: list[torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def build(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> PalForCausalLM:
    """Builds a model in which every parameter matters (gates open, norms off their neutral point)."""
    with lifted_to_float64() if dtype == torch.float64 else nullcontext():
        config = PalConfig(
            language_model_config=stock_config(case.family),
            streams=case.streams,
            encoder_widths={name: ENCODERS[name] for name in case.encoders},
            encoder_grids=GRIDS,
            audio_token_id=AUDIO_TOKEN,
            **dict(case.switches),
        )
        model = PalForCausalLM(config).to(dtype).eval()
    randomise(model, seed)
    return model


def oracle_method(case: Case, **settings: Any) -> oracle.Method:
    streams = tuple(
        oracle.Stream(
            encoders=stream.encoders,
            integration=stream.integration,
            connector=OracleConnector(
                stream.connector.kind,
                stream.connector.summary_stride,
                stream.connector.num_layers or 0,
                stream.connector.num_heads or 0,
                tuple(GRIDS[name] for name in stream.encoders if name in GRIDS),
            ),
            audio_layers=stream.audio_layers,
            summary_of=stream.summary_of,
            gain=None if stream.gain is None else stream.gain.target,
        )
        for stream in case.streams
    )
    method = oracle.Method(oracle_language_model(case.family), streams)
    return replace(method, **dict(case.switches), **settings)


def of_product(model: PalForCausalLM, case: Case, rows: Sequence[Row], loss_on: str = "answer") -> Result:
    dtype = next(model.parameters()).dtype
    batch = collate(rows, case.encoders, loss_on)
    batch["audio_features"] = {name: x.to(dtype) for name, x in batch["audio_features"].items()}
    labels = batch.pop("labels")
    model.zero_grad()
    with lifted_to_float64() if dtype == torch.float64 else nullcontext():
        with torch.no_grad():
            logits = model(**batch).logits
        loss = model(**batch, labels=labels).loss
        loss.backward()
    text_logits = []
    for row, row_logits in zip(rows, logits, strict=True):
        for items, columns in zip(row.alone(), row.columns(), strict=True):
            text_logits.append(
                row_logits[[column for item, column in zip(items, columns, strict=True) if isinstance(item, int)]]
            )
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Result(text_logits, loss.detach(), gradients)


def answers(model: PalForCausalLM, case: Case, rows: Sequence[Row], new_tokens: int) -> list[list[int]]:
    """Generates greedy answers of the model to unpacked rows, in float64."""
    batch = collate(rows, case.encoders, "answer")
    with lifted_to_float64():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            audio_features=batch["audio_features"],
            audio_lengths=batch["audio_lengths"],
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=AUDIO_TOKEN,  # never generated
        )
    return tokens.tolist()


def of_oracle(model: PalForCausalLM, method: oracle.Method, rows: Sequence[Row], loss_on: str = "answer") -> Result:
    """Computes the same by the oracle, from the model's weights."""
    weights = {
        name: parameter.detach().to(torch.float64, copy=True).requires_grad_()
        for name, parameter in model.named_parameters()
    }
    total, count, text_logits = torch.zeros((), dtype=torch.float64), 0, []
    for row in rows:
        for items, labels in zip(row.alone(), labels_of(row, loss_on), strict=True):
            conversation, scores = oracle.run(method, weights, items)
            text_logits.append(torch.stack([scores[member] for member in conversation.text.values()]).detach())
            total = total + oracle.loss_sum(conversation, scores, labels)
            count += len(labels) - labels.count(IGNORE_INDEX)
    loss = total / count
    loss.backward()
    return Result(text_logits, loss.detach(), {name: weight.grad for name, weight in weights.items()})


def differences(product: Result, expected: Result) -> dict[str, float]:
    """Returns the largest absolute difference of the logits, the loss and every parameter's gradient.

    A gradient that the oracle lacks (its parameter was not used) must be zero.
    """
    worst = {
        "logits": max(float((a - b).abs().max()) for a, b in zip(product.logits, expected.logits, strict=True)),
        "loss": float((product.loss - expected.loss).abs()),
    }
    for name, gradient in product.gradients.items():
        expected_gradient = expected.gradients[name]
        assert gradient is not None, f"{name} got no gradient"
        worst[name] = float((gradient - (0 if expected_gradient is None else expected_gradient)).abs().max())
    return worst
