"""The planner against what DeepSpeed holds and takes on CPU ranks: integration x stage x size x accumulation.

`python tests/cost/test_predictions_measured.py OUT` writes the table in Markdown, for `pal report --append`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":  # pytest finds the helpers by its own setting
    sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.config import load_config
from pipeline.config.cluster import ClusterConfig
from pipeline.core.console import markdown_table
from pipeline.cost.predict import predict
from tests.helpers.planned_jobs import STEPS, WORKLOAD, measure, write_job
from tests.helpers.ranks import run_on_ranks

GIB, MIB = 2**30, 2**20
# size, integration, ZeRO stage, ranks, accumulation, precision
Case = tuple[str, str, int, int, int, str]
FITTED: list[Case] = [
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
OTHERS: list[Case] = [
    ("small", "lal", 1, 2, 2, "fp32"),
    ("wide", "plits", 1, 2, 1, "bf16"),
    ("wide", "lal", 0, 2, 1, "fp32"),
    ("small", "plits", 3, 2, 2, "fp32"),
    ("wide", "pal_v3", 2, 2, 1, "bf16"),
    ("wide", "plits", 0, 1, 2, "bf16"),
]
CASES = FITTED + OTHERS
INTRODUCTION = """What `pal plan` predicts and what DeepSpeed then holds on each of the CPU ranks, predicted / measured
(error). *Total* is the highest point of a step."""
STATES = ("parameters", "gradients", "optimizer")


def compare(case: Case, steps: int) -> dict[str, tuple[float, float]]:
    """Prediction and measurement of each part (MiB), and of the step (s) if steps are timed."""
    size, integration, stage, ranks, accumulation, precision = case
    with tempfile.TemporaryDirectory() as folder:
        config = write_job(Path(folder), size, integration, stage, ranks, accumulation, precision=precision)
        cluster = load_config(ClusterConfig, "cpu", [f"gpus_per_node={ranks}"])
        prediction = predict(config, cluster, WORKLOAD)
        measured: dict[str, Any] = run_on_ranks(measure, ranks, config, steps, limit_s=600)[0]
    parts = {p: (prediction.memory_gib[p] * GIB / MIB, measured[p] / MIB) for p in (*STATES, "total")}
    return parts | ({"step_s": (prediction.step_s, measured["step_s"])} if steps else {})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_predicted_bytes_are_those_that_deepspeed_holds(case: Any) -> None:
    compared = compare(case, 0)
    for part in STATES:
        predicted, measured = compared[part]
        assert predicted == pytest.approx(measured, rel=0.02), part
    predicted, measured = compared["total"]
    assert predicted == pytest.approx(measured, rel=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description="The planner's predictions beside what DeepSpeed holds and takes.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Markdown file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps (default: %(default)s); 0: bytes alone")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    compared = [compare(case, arguments.steps) for case in CASES]
    parts = list(compared[0])
    if arguments.steps:  # over their mean: absolute speed is the machine's, the ratio the model's
        mean = np.exp(np.log([found["step_s"] for found in compared]).mean(axis=0))
        compared = [{**found, "step_s": tuple(found["step_s"] / mean)} for found in compared]
    rows = [
        [" ".join(map(str, case)), *(f"{p:.2f} / {m:.2f} ({p / m - 1:+.1%})" for p, m in found.values())]
        for case, found in zip(CASES, compared, strict=True)
    ]
    headings = ["size, integration, ZeRO stage, ranks, accumulation, precision"]
    headings += ["step, of the mean" if part == "step_s" else f"{part}, MiB" for part in parts]
    lines = ["## Plan against measurement", INTRODUCTION]
    if "step_s" in parts:
        lines.append(
            f"Step times are those of the fastest of {arguments.steps} steps over the geometric mean of all rows; to "
            f"the first {len(FITTED)} the rates of `cpu.yaml` were fitted, to the others not. Others' processes at the "
            f"start (load average): {load:.1f}."
        )
    else:
        lines.append("Step times were not measured: the machine was shared, and ratios of times would say nothing.")
    arguments.out.write_text("\n\n".join([*lines, markdown_table(headings, rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
