"""The planner against what DeepSpeed holds and takes on CPU ranks: integration x stage x size x accumulation.

`python tests/distributed/test_plan_measured.py` prints the table."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":  # pytest finds the helpers by its own setting
    sys.path.insert(0, str(Path(__file__).parents[1]))

from planned_jobs import WORKLOAD, measure, write_job
from ranks import run_on_ranks

from pipeline import planning
from pipeline.config import load_config
from pipeline.config.planning import ClusterConfig

GIB, MIB = 2**30, 2**20
# size, integration, ZeRO stage, ranks, accumulation, precision
CASES = [
    ("wide", "plits", 0, 1, 1, "fp32"),
    ("wide", "lal", 0, 1, 2, "fp32"),
    ("wide", "pal_v3", 0, 1, 1, "bf16"),
    ("small", "plits", 1, 2, 1, "fp32"),
    ("wide", "lal", 1, 2, 2, "bf16"),
    ("wide", "pal_v3", 1, 2, 2, "fp32"),
    ("wide", "plits", 2, 2, 2, "fp32"),
    ("wide", "lal", 2, 1, 1, "bf16"),
    ("small", "pal_v3", 2, 2, 1, "fp32"),
    ("wide", "plits", 3, 2, 1, "fp32"),
    ("wide", "lal", 3, 2, 2, "fp32"),
    ("wide", "pal_v3", 3, 2, 1, "bf16"),
]
STATES = ("parameters", "gradients", "optimizer")


def compare(case: tuple[str, str, int, int, int, str]) -> dict[str, tuple[float, float]]:
    """Prediction and measurement of each part (MiB) and of the step (s)."""
    size, integration, stage, ranks, accumulation, precision = case
    with tempfile.TemporaryDirectory() as folder:
        config = write_job(Path(folder), size, integration, stage, ranks, accumulation, precision=precision)
        cluster = load_config(ClusterConfig, "cpu", [f"gpus_per_node={ranks}"])
        prediction = planning.predict(config, cluster, WORKLOAD)
        measured: dict[str, Any] = run_on_ranks(measure, ranks, config)[0]
    parts = {p: (prediction.memory_gib[p] * GIB / MIB, measured[p] / MIB) for p in (*STATES, "total")}
    return {**parts, "step_s": (prediction.step_s, measured["step_s"])}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_predicted_bytes_are_those_that_deepspeed_holds(case: Any) -> None:
    compared = compare(case)
    for part in STATES:
        predicted, measured = compared[part]
        assert predicted == pytest.approx(measured, rel=0.02), part
    predicted, measured = compared["total"]
    assert predicted == pytest.approx(measured, rel=0.15)


def main() -> None:
    wanted = [CASES[int(n)] for n in sys.argv[1:]] or CASES
    first: tuple[float, float] | None = None
    for case in wanted:
        compared = compare(case)
        first = first or compared["step_s"]
        ratios = tuple(s / f for s, f in zip(compared["step_s"], first, strict=True))
        cells = [f"{p} {a:.1f}/{b:.1f} ({a / b - 1:+.1%})" for p, (a, b) in compared.items() if p != "step_s"]
        times = "/".join(f"{1000 * s:.1f}" for s in compared["step_s"])
        cells += [f"ms {times}", f"ratio {ratios[0]:.2f}/{ratios[1]:.2f} ({ratios[0] / ratios[1] - 1:+.0%})"]
        print(" ".join(map(str, case)), *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
