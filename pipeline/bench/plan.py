"""`pal bench plan OUT.md`: compares predicted with measured memory and time, in small runs on CPU ranks.

The table is Markdown, for `pal report --append`."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.arguments import add_dry_run, add_json, write_results
from pipeline.core.console import markdown_table, progress
from pipeline.core.errors import UserError, run_command
from pipeline.core.ranks import ACCELERATOR_VARIABLE, free_port
from pipeline.core.units import GIB, MIB

if TYPE_CHECKING:
    from pipeline.config import ExperimentConfig

STEPS = 8
STATES = ("parameters", "gradients", "optimizer")
INTRODUCTION = """What `pal plan` predicts and what DeepSpeed then holds on each of the CPU ranks, predicted / measured
(error). *Total* is the highest point of a step."""


@dataclass(frozen=True)
class PlannedRun:
    """One small run.

    Attributes:
        size: size of the language model, see `planned_runs.SIZES`.
        ranks: number of ranks, all on this machine.
        accumulation: micro-batches of a step.
    """

    size: str
    integration: str
    zero_stage: int
    ranks: int = 1
    accumulation: int = 1
    precision: str = "fp32"

    def __str__(self) -> str:
        return " ".join(map(str, asdict(self).values()))


# To the step times of these runs the rates of `cpu.yaml` were fitted.
FITTED = (
    PlannedRun("wide", "plits", 0, 1, 1, "fp32"),
    PlannedRun("wide", "lal", 0, 1, 2, "fp32"),
    PlannedRun("wide", "pal_v3", 0, 1, 1, "bf16"),
    PlannedRun("small", "plits", 1, 2, 1, "fp32"),
    PlannedRun("wide", "lal", 1, 2, 2, "bf16"),
    PlannedRun("wide", "pal_v3", 1, 2, 2, "fp32"),
    PlannedRun("wide", "plits", 2, 2, 2, "fp32"),
    PlannedRun("wide", "lal", 2, 1, 1, "bf16"),
    PlannedRun("small", "pal_v3", 2, 2, 1, "fp32"),
    PlannedRun("wide", "plits", 3, 2, 1, "fp32"),
    PlannedRun("wide", "lal", 3, 2, 2, "fp32"),
    PlannedRun("wide", "pal_v3", 3, 2, 1, "bf16"),
)
NOT_FITTED = (
    PlannedRun("small", "lal", 1, 2, 2, "fp32"),
    PlannedRun("wide", "plits", 1, 2, 1, "bf16"),
    PlannedRun("wide", "lal", 0, 2, 1, "fp32"),
    PlannedRun("small", "plits", 3, 2, 2, "fp32"),
    PlannedRun("wide", "pal_v3", 2, 2, 1, "bf16"),
    PlannedRun("wide", "plits", 0, 1, 2, "bf16"),
)
RUNS = FITTED + NOT_FITTED

Comparison = dict[str, tuple[float, float]]  # part -> prediction and measurement


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.steps < 0:
        raise UserError("--steps", f"{arguments.steps} is negative", "give 0 or more")
    if arguments.dry_run:
        print("\n".join(map(str, RUNS)))
        return 0
    load, comparisons = os.getloadavg()[0], []
    with progress(len(RUNS), "runs") as shown:
        for run in RUNS:
            comparisons.append(compare(run, arguments.steps))
            shown.advance(note=str(run))
    arguments.out.write_text(page(comparisons, arguments.steps, load), encoding="utf-8")
    rows = [
        {**asdict(run), **{part: {"predicted": p, "measured": m} for part, (p, m) in comparison.items()}}
        for run, comparison in zip(RUNS, comparisons, strict=True)
    ]
    write_results({"steps": arguments.steps, "load_average": load, "rows": rows}, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal bench plan",
        description="Compare predicted with measured memory and time, in small runs on CPU ranks. Writes a Markdown "
        "table for `pal report --append`.",
    )
    parser.add_argument("out", type=Path, metavar="OUT.md", help="Markdown file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps (default: %(default)s); 0: only bytes")
    add_json(parser)
    add_dry_run(parser, "print the runs, measure nothing")
    return parser


def compare(run: PlannedRun, steps: int) -> Comparison:
    """Predicts and measures one run.

    Args:
        steps: number of timed steps; 0 leaves `step_s` out.

    Returns:
        each part of the memory and `total` in MiB, and `step_s`.
    """
    from pipeline.bench.planned_runs import WORKLOAD, write_config
    from pipeline.config import load_config
    from pipeline.config.cluster import ClusterConfig
    from pipeline.cost.predict import predict

    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), run)
        cluster = load_config(ClusterConfig, "cpu", [f"gpus_per_node={run.ranks}"])
        prediction = predict(config, cluster, WORKLOAD)
        measured = measure_on_ranks(config, run.ranks, steps)
    parts = {part: (prediction.memory_gib[part] * GIB / MIB, measured[part] / MIB) for part in (*STATES, "total")}
    return parts | ({"step_s": (prediction.step_s, measured["step_s"])} if steps else {})


def measure_on_ranks(config: ExperimentConfig, world_size: int, steps: int) -> dict[str, float]:
    """Returns what rank 0 measures of a run whose ranks are processes of this machine; see `planned_runs.measure`.

    A rank that waits for one that has failed raises after the group's timeout.
    """
    port = free_port()
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        # Every rank occupies a process until all ranks have joined the group, so none runs two of them.
        futures = [pool.submit(_measure_on_rank, rank, world_size, port, config, steps) for rank in range(world_size)]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return futures[0].result()


def _measure_on_rank(rank: int, world_size: int, port: int, config: ExperimentConfig, steps: int) -> dict[str, float]:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        ACCELERATOR_VARIABLE: "cpu",
    }
    import torch

    from pipeline.bench.planned_runs import measure

    torch.set_num_threads(1)
    return measure(config, steps)


def page(comparisons: Sequence[Comparison], steps: int, load: float) -> str:
    """Returns the Markdown page.

    Args:
        comparisons: one for each of `RUNS`.
        steps: number of timed steps.
        load: load average of the machine before the first run.
    """
    parts = list(comparisons[0])
    if steps:  # over their mean: absolute speed is the machine's, the ratio the model's
        comparisons = _relative_step_times(comparisons)
        timing = (
            f"Step times are those of the fastest of {steps} steps over the geometric mean of all rows; to the first "
            f"{len(FITTED)} the rates of `cpu.yaml` were fitted, to the others not. Others' processes at the start "
            f"(load average): {load:.1f}."
        )
    else:
        timing = "Step times were not measured: the machine was shared, and ratios of times would say nothing."
    headings: list[Any] = ["size, integration, ZeRO stage, ranks, accumulation, precision"]
    headings += ["step, of the mean" if part == "step_s" else f"{part}, MiB" for part in parts]
    rows = [
        [str(run), *(f"{p:.2f} / {m:.2f} ({p / m - 1:+.1%})" for p, m in comparison.values())]
        for run, comparison in zip(RUNS, comparisons, strict=True)
    ]
    return "\n\n".join(["## Plan against measurement", INTRODUCTION, timing, markdown_table(headings, rows)]) + "\n"


def _relative_step_times(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Divides predicted and measured step times by their geometric means over all runs."""
    times = [comparison["step_s"] for comparison in comparisons]
    predicted_mean, measured_mean = (
        math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*times, strict=True)
    )
    return [
        {**comparison, "step_s": (predicted / predicted_mean, measured / measured_mean)}
        for comparison, (predicted, measured) in zip(comparisons, times, strict=True)
    ]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
