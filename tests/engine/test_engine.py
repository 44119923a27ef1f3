"""The result of training does not depend on how the work is split: ZeRO stage, micro-batches, ranks. A plain torch loop
is the reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.ranks import read_ranks
from pipeline.engine import ADAM_EPSILON, Engine, trained_weights
from pipeline.training.lr_schedule import lr_multiplier
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_engine import (
    CLIPPING,
    LANGUAGE_MODEL,
    STEPS,
    Curve,
    build,
    collate,
    rows,
    settings,
    tiny_model,
    train_steps,
    weights,
)

WAYS_TO_SAVE = [
    ("zero0", LANGUAGE_MODEL),
    ("zero1", "none"),
    ("zero2", "none"),
    ("zero2", LANGUAGE_MODEL),
    ("zero3", "none"),
    ("zero3", LANGUAGE_MODEL),
]


def reference() -> tuple[Curve, dict[str, torch.Tensor]]:
    """Runs the same training in plain torch, with the whole global batch at once."""
    model = tiny_model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=ADAM_EPSILON)
    curve = []
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, (1e-2, 2e-2), strict=True):
            group["lr"] = peak * lr_multiplier(step + 1, STEPS, 0.25, 0.1)
        loss = model(**collate(rows(step))).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve, model.state_dict()


def train_every_way() -> dict[str, Any]:
    """Trains at every stage, with micro-batches of one size and of varying size, in one set of processes, because
    starting them takes most of the time."""
    results: dict[str, Any] = {}
    for policy in ("zero0", "zero1", "zero2", "zero3"):
        for sizes in ([2], [4, 1, 2, 3]):
            engine = build(settings(policy, 2))
            results[f"{policy} micro-batches {sizes}"] = (train_steps(engine, range(STEPS), sizes), weights(engine))
    return results


@pytest.fixture(scope="module")
def expected() -> tuple[Curve, dict[str, torch.Tensor]]:
    return reference()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_split_of_the_work_does_not_matter(
    world_size: int, expected: tuple[Curve, dict[str, torch.Tensor]]
) -> None:
    """fp32: only the order of sums differs, so losses agree to 1e-6. Adam divides small gradients by their magnitude,
    so weights agree to a small fraction of a step (1e-2)."""
    curve, final = expected
    results = run_on_ranks(train_every_way, world_size)
    assert len(results[0]) == 8
    for way, (losses, state) in results[0].items():
        for (loss, norm), (expected_loss, expected_norm) in zip(losses, curve, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-6), way
            assert norm == pytest.approx(expected_norm, rel=1e-5), way
        for name, tensor in final.items():
            torch.testing.assert_close(
                state[name], tensor, rtol=0, atol=1e-4, msg=lambda m, w=way, n=name: f"{w} {n}: {m}"
            )


def one_rank_without_audio(policies: list[str]) -> dict[str, Curve]:
    return {policy: train_steps(build(settings(policy, 2)), range(2), 2, text_only_rank=1) for policy in policies}


def test_a_rank_with_text_only_does_not_hang_the_others() -> None:
    results = run_on_ranks(one_rank_without_audio, 2, ["zero0", "zero1", "zero2", "zero3"], limit_s=150)
    assert results[0] == results[1]
    first, *curves = results[0].values()
    for curve in curves:
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in first], abs=1e-6)


def save_and_continue(folder: Path, policy: str, frozen: str) -> tuple[Curve, Any]:
    engine = build(settings(policy, 2), frozen)
    first = train_steps(engine, range(2), 2)
    engine.snapshot(folder, copied=True).write()
    return first + train_steps(engine, range(2, STEPS), 2), weights(engine)


def load_and_continue(folder: Path, policy: str, frozen: str) -> tuple[Curve, Any]:
    engine = build(settings(policy, 2), frozen)
    engine.load(folder)
    return train_steps(engine, range(2, STEPS), 2), weights(engine)


def save_and_load_every_way(folder: Path) -> dict[str, Any]:
    results = {}
    for policy, frozen in WAYS_TO_SAVE:
        output = folder / f"{policy}-{frozen}"
        results[output.name] = (save_and_continue(output, policy, frozen), load_and_continue(output, policy, frozen))
    return results


def test_a_loaded_state_continues_bit_for_bit(tmp_path: Path) -> None:
    """Frozen parameters are not in the files, which therefore stay small."""
    results = run_on_ranks(save_and_load_every_way, 2, tmp_path)
    for way, ((straight, final), (resumed, final_resumed)) in results[0].items():
        assert resumed == straight[2:], way
        for name, tensor in final.items():
            assert torch.equal(final_resumed[name], tensor), f"{way} {name}"
        exported = trained_weights(tmp_path / way)
        frozen = way.endswith(LANGUAGE_MODEL)
        assert any(name.startswith("language_model") for name in exported) != frozen
        assert any(name.startswith("streams") for name in exported)


def save_in_half_precision(folder: Path) -> dict[str, Any]:
    results = {}
    for policy in ("zero0", "zero1", "zero2", "zero3"):
        engine = build(settings(policy, 2, "bf16"), LANGUAGE_MODEL)
        train_steps(engine, range(1), 2)
        engine.snapshot(folder / policy, copied=False).write()
        results[policy] = weights(engine)
    return results


def test_trained_weights_are_read_from_every_stage_in_half_precision(tmp_path: Path) -> None:
    for policy, final in run_on_ranks(save_in_half_precision, 2, tmp_path)[0].items():
        trained = trained_weights(tmp_path / policy)
        assert trained.keys() == {name for name in final if name.startswith("streams.")}, policy
        for name, tensor in trained.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.to(final[name].dtype), final[name]), f"{policy} {name}"


def test_an_error_while_evaluating_leaves_the_model_in_training_mode() -> None:
    engine = object.__new__(Engine)  # without DeepSpeed and ranks, which take seconds
    engine._torch, engine._engine = torch, torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="out of memory"), engine.evaluating():
        assert not engine._engine.training and not torch.is_grad_enabled()
        raise RuntimeError("out of memory")
    assert engine._engine.training and torch.is_grad_enabled()


def divide_by_nan(policies: list[str]) -> dict[str, Any]:
    results = {}
    for policy in policies:
        engine = build(settings(policy, 4))
        initial = weights(engine)
        batch = collate(rows(0)[read_ranks().rank :: 2])
        # Dividing by NaN on one rank makes the loss and the gradients of that rank not finite.
        engine.backward({**batch, "num_items_in_batch": 1.0 if read_ranks().rank == 0 else float("nan")}, last=True)
        applied = engine.step(1.0)
        final = weights(engine)
        unchanged = initial is None or all(torch.equal(initial[name], final[name]) for name in initial)
        results[policy] = (applied, engine.skipped_steps, unchanged, train_steps(engine, range(1), 4))
    return results


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    for result in run_on_ranks(divide_by_nan, 2, ["zero0", "zero1", "zero2", "zero3"]):
        for policy, (applied, skipped, unchanged, curve) in result.items():
            assert (applied, skipped, unchanged) == (False, 1, True), policy
            assert math.isfinite(curve[0][0]), f"{policy}: the next step"
