"""The planner's predictions beside what DeepSpeed holds on CPU ranks: integration x stage x size x accumulation."""

from __future__ import annotations

import pytest

from pipeline.bench.plan import RUNS, STATES, PlannedRun, compare


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run).replace(" ", "-"))
def test_predicted_bytes_are_those_that_deepspeed_holds(run: PlannedRun) -> None:
    comparison = compare(run, 0)
    for part in STATES:
        predicted, measured = comparison[part]
        assert predicted == pytest.approx(measured, rel=0.02), part
    predicted, measured = comparison["total"]
    assert predicted == pytest.approx(measured, rel=0.15)
