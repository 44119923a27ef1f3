"""`pal sweep SWEEP`: a scaling experiment from one file. Plans every trial, runs those that are not finished, and goes
on when one fails."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.console import format_table
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not
    from pipeline.config.cluster import WorkloadConfig
    from pipeline.experiments.trials import BudgetConfig, SweepConfig, Trial

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    from pipeline.config import load_config
    from pipeline.experiments.trials import SweepConfig

    sweep = load_config(SweepConfig, arguments.sweep, arguments.overrides)
    trials, rows = plan_trials(sweep)
    print(_table(rows), flush=True)
    if arguments.dry_run:
        results = [{"params": trial.params, "status": "PLANNED", "run_id": None, "metrics": row}
                   for trial, row in zip(trials, rows, strict=True)]  # fmt: skip
    else:
        results = run(sweep, trials, arguments.ray)
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": results}, indent=2) + "\n", encoding="utf-8")
    failed = [result for result in results if result["status"] == "FAILED"]
    return EXIT_FAILURE if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal sweep",
        description="Run the trials of a scaling experiment. Started again, it runs those that are not finished.",
    )
    parser.add_argument("sweep", help="the sweep's YAML file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the sweep")
    parser.add_argument("--ray", metavar="ADDRESS", help="place trials on this Ray cluster, as many at once as fit")
    parser.add_argument("--dry-run", action="store_true", help="print the table of trials, run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def plan_trials(sweep: SweepConfig) -> tuple[list[Trial], list[Row]]:
    """Every trial with the budget made good, and what the planner says of it.

    Raises:
        UserError: a key that does not exist, trials that are the same, or one that cannot fit.
    """
    from pipeline.config import load_config
    from pipeline.config.cluster import ClusterConfig
    from pipeline.cost.predict import predict
    from pipeline.cost.workload import measure_workload, model_size, run_flops, total_steps
    from pipeline.experiments.trials import SEED, make_trial

    cluster = load_config(ClusterConfig, sweep.cluster, [f"gpus_per_node={sweep.nproc}", "nodes=1"])
    workloads: dict[str, WorkloadConfig] = {}
    trials, rows = [], []
    for combination, seed in itertools.product(sweep.combinations(), sweep.seeds):
        params = {**combination, SEED: seed}
        trial = make_trial(sweep, params, 1 if sweep.budget else None)
        if trial.config.stages:
            raise UserError("experiment", "has stages; a trial is one run", "give a config without them")
        model = trial.config.model
        reads = repr((trial.config.data, model.encoders, model.language_model))
        if reads not in workloads:
            workloads[reads] = measure_workload(trial.config)
        workload = workloads[reads]
        if sweep.budget:
            trial = make_trial(sweep, params, _steps(sweep.budget, trial, workload))
        prediction = predict(trial.config, cluster, workload)
        if prediction.does_not_fit:
            fault = f"does not fit on {cluster.gpu.name}: it {prediction.does_not_fit}"
            raise UserError(f"trial {trial.name}", fault, "change the trial or `cluster`")
        size, steps = model_size(trial.config, workload), total_steps(trial.config, workload)
        trials.append(trial)
        rows.append(
            {
                "trial": trial.name,
                "audio_layers": [list(stream.audio_layers) for stream in size.config.stream_specs()],
                "parameters": size.total,
                "steps": steps,
                "flops": run_flops(trial.config, workload),
                "memory_gib": prediction.memory_gib["total"],
                "hours": steps * prediction.step_s / 3600,
            }
        )
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"trial {name}", "is there twice", "let trials differ in a key's last part or in values")
    return trials, rows


def _steps(budget: BudgetConfig, trial: Trial, workload: WorkloadConfig) -> int:
    """Steps that spend the budget on a trial, which has one; at least one."""
    from pipeline.cost.workload import run_flops, step_tokens

    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return max(1, round(budget.tokens / step_tokens(trial.config, workload)))
    return max(1, round((budget.flops or 0) / run_flops(trial.config, workload)))


def run(sweep: SweepConfig, trials: Sequence[Trial], ray_address: str | None) -> list[Row]:
    """Results of all trials in their order; what is finished is not run again."""
    from pipeline.config import TrackingConfig, dump_config
    from pipeline.core import provenance
    from pipeline.experiments.trials import run_trial
    from pipeline.tracking import writer

    sweep.output.mkdir(parents=True, exist_ok=True)
    recorded = TrackingConfig(uri=sweep.tracking_uri, experiment=sweep.name, run_name="sweep")
    try:
        where = provenance.machine() if ray_address is None else f"the Ray cluster at {ray_address}"
        parent = writer.open_parent(recorded, sweep.output, dump_config(sweep), where)
    except Exception as error:  # of many libraries; trials then stand alone, and upload what they can
        print(f"pal: MLflow does not answer ({type(error).__name__}): no run above the trials", file=sys.stderr)
        parent = None
    say = _progress(len(trials))
    if ray_address is not None:
        from pipeline.experiments.ray_trials import run_on_cluster

        results = run_on_cluster(ray_address, trials, parent, sweep.evaluate, sweep.nproc, say)
    else:
        results = []
        for trial in trials:
            results.append(run_trial(trial, parent, sweep.evaluate, sweep.nproc))
            say(trial.name, results[-1])
    if parent is not None:
        failed = any(result["status"] == "FAILED" for result in results)
        writer.close_parent(recorded, sweep.output, parent, "FAILED" if failed else "FINISHED")
    return results


def _progress(total: int) -> Callable[[str, Row], None]:
    done = 0

    def say(name: str, result: Row) -> None:
        nonlocal done
        done += 1
        figures = ", ".join(f"{key} {value:.4g}" for key, value in result["metrics"].items()
                            if key == "final_loss" or key.endswith("/accuracy"))  # fmt: skip
        told = result["error"] if result["status"] == "FAILED" else figures
        print(f"[{done}/{total}] {name}: {result['status']} {told}", file=sys.stderr, flush=True)

    return say


def _table(rows: Sequence[Row]) -> str:
    lines = [["trial", "audio layers", "parameters", "steps", "FLOPs", "GiB", "hours"]]
    for row in rows:
        layers = " ".join("all" if not own else f"{own[0]}-{own[-1]} ({len(own)})" for own in row["audio_layers"])
        lines.append([row["trial"], layers, f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['flops']:.3g}",
                      f"{row['memory_gib']:.3g}", f"{row['hours']:.3g}"])  # fmt: skip
    return format_table(lines)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
