"""Another number of ranks resumes where the first stopped: 2 -> 1 -> 2 ranks leaves the curve unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.ranks import read_ranks
from pipeline.engine import start_resharding
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_engine import LANGUAGE_MODEL, STEPS, Curve, build, settings, train_steps, weights

WAYS = [("zero1", LANGUAGE_MODEL), ("zero2", "none"), ("zero2", LANGUAGE_MODEL), ("zero3", LANGUAGE_MODEL)]
ALONE = range(1, 3)  # steps that a single rank takes


def begin(folder: Path, policy: str, frozen: str) -> tuple[Curve, Any, dict[str, str]]:
    engine = build(settings(policy, 2), frozen)
    curve = train_steps(engine, range(ALONE.start), 2)
    saved = engine.checksums()
    engine.snapshot(folder / "first", copied=True).write()
    engine.barrier()
    return curve + train_steps(engine, range(ALONE.start, STEPS), 2), weights(engine), saved


def resume(folder: Path, policy: str, frozen: str, source: str, steps: range) -> dict[str, Any]:
    engine = build(settings(policy, 2), frozen)
    fresh, converted = engine.checksums(), folder / f"{source}-universal"
    if read_ranks().is_main:
        assert start_resharding(folder / source, converted).wait() == 0
    engine.barrier()
    engine.load(converted, universal=True)
    loaded, curve, saved = engine.checksums(), train_steps(engine, steps, 2), engine.checksums()
    engine.snapshot(folder / "second", copied=True).write()
    engine.barrier()
    return {"fresh": fresh, "loaded": loaded, "saved": saved, "curve": curve, "weights": weights(engine)}


def on_every_way(function: Any, folder: Path, *arguments: Any) -> dict[str, Any]:
    return {f"{p}-{f}": function(folder / f"{p}-{f}", p, f, *arguments) for p, f in WAYS}


def test_two_ranks_then_one_then_two_keep_the_curve(tmp_path: Path) -> None:
    """fp32: losses within 1e-6 of the uninterrupted run, weights within a small fraction of a step. The loaded weights
    are the saved ones, by a checksum that depends on neither the stage nor the number of ranks."""
    for policy, frozen in WAYS:
        (tmp_path / f"{policy}-{frozen}").mkdir()
    straight = run_on_ranks(on_every_way, 2, begin, tmp_path)[0]
    alone = run_on_ranks(on_every_way, 1, resume, tmp_path, "first", ALONE)[0]
    together = run_on_ranks(on_every_way, 2, resume, tmp_path, "second", range(ALONE.stop, STEPS))[0]
    for way, (curve, final, saved) in straight.items():
        one, two = alone[way], together[way]
        assert one["loaded"] == saved and two["loaded"] == one["saved"], way
        assert one["fresh"]["trained"] != saved["trained"] and one["fresh"]["frozen"] == saved["frozen"], way
        for step, (loss, norm) in zip(range(ALONE.start, STEPS), one["curve"] + two["curve"], strict=True):
            assert loss == pytest.approx(curve[step][0], abs=1e-6), f"{way} step {step}"
            assert norm == pytest.approx(curve[step][1], rel=1e-4), f"{way} step {step}"
        for name, tensor in final.items():
            assert (two["weights"][name] - tensor).abs().max() < 1e-4, f"{way} {name}"
    assert len({alone[f"{policy}-{LANGUAGE_MODEL}"]["fresh"]["trained"] for policy in ("zero1", "zero2", "zero3")}) == 1
