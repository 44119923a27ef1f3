"""The line that a training run shows for a logged step."""

from __future__ import annotations

import pytest

from pipeline.engine import ParameterGroup
from pipeline.training.trainer import format_rates

STREAMS = [ParameterGroup("streams.matrices", [], 1e-3, 0.1), ParameterGroup("streams.vectors", [], 1e-3, 0.0)]
LANGUAGE_MODEL = [ParameterGroup("language_model.matrices", [], 1e-4, 0.1)]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(STREAMS, "5.00e-04"), (LANGUAGE_MODEL, "5.00e-05"), ([*STREAMS, *LANGUAGE_MODEL], "5.00e-04/5.00e-05")],
)
def test_the_learning_rates_are_those_of_what_is_trained(groups: list[ParameterGroup], expected: str) -> None:
    assert format_rates(groups, 0.5) == expected
