"""The line that a training run shows for a logged step."""

from __future__ import annotations

import pytest

from pipeline.engine import ParameterGroup
from pipeline.training.throughput import ThroughputMeter, TimeLeft
from pipeline.training.trainer import format_rates

STREAMS = [ParameterGroup("streams.matrices", [], 1e-3, 0.1), ParameterGroup("streams.vectors", [], 1e-3, 0.0)]
LANGUAGE_MODEL = [ParameterGroup("language_model.matrices", [], 1e-4, 0.1)]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(STREAMS, "5.00e-04"), (LANGUAGE_MODEL, "5.00e-05"), ([*STREAMS, *LANGUAGE_MODEL], "5.00e-04/5.00e-05")],
)
def test_the_learning_rates_are_those_of_what_is_trained(groups: list[ParameterGroup], expected: str) -> None:
    assert format_rates(groups, 0.5) == expected


def test_the_time_left_counts_the_steps_after_the_first_of_a_process() -> None:
    time_left = TimeLeft()
    assert time_left.estimate(101, 200, 90.0) == "time left unknown"
    time_left.begin(101, 90.0)  # resumed at step 100: the first step took 90 s
    time_left.begin(102, 92.0)
    assert time_left.estimate(102, 200, 92.0) == "3 min 16 s left"
    assert time_left.estimate(200, 200, 300.0) == "0 s left"


def test_the_time_of_training_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.training.throughput.time.perf_counter", lambda: clock[0])
    meter = ThroughputMeter()
    clock[0] = 5.0
    meter.lap()
    with meter.paused():
        clock[0] = 25.0
    clock[0] = 27.0
    assert meter.elapsed_s == 7.0
