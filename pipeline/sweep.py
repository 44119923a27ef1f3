"""`pal sweep SWEEP`: runs a scaling experiment from one file.

Plans every trial, runs those that are not finished, and continues with the others when one fails."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core.arguments import add_config, add_dry_run, add_json, write_results
from pipeline.core.console import Progress, format_table, logger, progress
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not
    from pipeline.config.cluster import WorkloadConfig
    from pipeline.experiments.trials import BudgetConfig, SweepConfig, Trial

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
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
    write_results({"runs": results}, arguments.json)
    failed = [result for result in results if result["status"] == "FAILED"]
    return EXIT_FAILURE if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal sweep",
        description="Run the trials of a scaling experiment. Rerun the same command to run the unfinished ones.",
    )
    add_config(parser, "sweep")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="Ray cluster address, or `auto`: runs as many trials at once as fit"
    )
    add_dry_run(parser, "print the table of trials and run nothing")
    add_json(parser)
    return parser


def plan_trials(sweep: SweepConfig) -> tuple[list[Trial], list[Row]]:
    """Returns every trial with the steps that its budget allows, and a row of predictions for each.

    Raises:
        UserError: an unknown key, two identical trials, or a trial that does not fit into memory.
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
            raise UserError("experiment", "has stages, but a trial is a single run", "give a config without stages")
        model = trial.config.model
        workload_key = repr((trial.config.data, model.encoders, model.language_model))
        if workload_key not in workloads:
            workloads[workload_key] = measure_workload(trial.config)
        workload = workloads[workload_key]
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
            raise UserError(
                f"trial {name}", "exists twice", "let the trials differ in the last part of a key or in a value"
            )
    return trials, rows


def _steps(budget: BudgetConfig, trial: Trial, workload: WorkloadConfig) -> int:
    """Returns the steps that use up the budget of a trial, at least one.

    Args:
        trial: the trial with a single step.
    """
    from pipeline.cost.workload import run_flops, step_tokens

    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return max(1, round(budget.tokens / step_tokens(trial.config, workload)))
    return max(1, round((budget.flops or 0) / run_flops(trial.config, workload)))


def run(sweep: SweepConfig, trials: Sequence[Trial], ray_address: str | None) -> list[Row]:
    """Runs the trials that are not finished; returns the results of all trials in their order."""
    from pipeline.config import TrackingConfig, dump_config
    from pipeline.core import provenance
    from pipeline.experiments.trials import is_finished, run_trial
    from pipeline.tracking import writer

    sweep.output.mkdir(parents=True, exist_ok=True)
    tracking = TrackingConfig(uri=sweep.tracking_uri, experiment=sweep.name, run_name="sweep")
    try:
        machine = provenance.machine() if ray_address is None else f"the Ray cluster at {ray_address}"
        parent = writer.open_parent(tracking, sweep.output, dump_config(sweep), machine)
    except Exception as error:  # MLflow raises errors of many libraries; the trials run without a parent
        logger.warning(f"MLflow does not answer ({type(error).__name__}); the trials are recorded without a parent run")
        parent = None
    finished = {trial.name for trial in trials if is_finished(trial)}
    with progress(len(trials), "trials", len(finished), alike=True) as bar:
        report = _result_reporter(bar, finished)
        if ray_address is not None:
            from pipeline.experiments.ray_trials import run_on_cluster

            results = run_on_cluster(ray_address, trials, parent, sweep.evaluate, sweep.nproc, report)
        else:
            results = []
            for trial in trials:
                results.append(run_trial(trial, parent, sweep.evaluate, sweep.nproc))
                report(trial.name, results[-1])
    if parent is not None:
        failed = any(result["status"] == "FAILED" for result in results)
        writer.close_parent(tracking, sweep.output, parent, "FAILED" if failed else "FINISHED")
    return results


def _result_reporter(bar: Progress, known: Collection[str]) -> Callable[[str, Row], None]:
    """Returns a function that shows the result of a trial when it ends.

    Args:
        known: trials that an earlier start finished, which count as done from the beginning.
    """
    finished = len(known)

    def report(name: str, result: Row) -> None:
        nonlocal finished
        finished += name not in known
        if result["status"] == "FAILED":
            logger.error(f"{name}: {result['error']}")
        metrics = [
            f"{key} {value:.4g}"
            for key, value in result["metrics"].items()
            if key == "final_loss" or key.endswith("/accuracy")
        ]
        bar.update(finished, f"{name}: {', '.join([result['status'], *metrics])}", force=True)

    return report


def _table(rows: Sequence[Row]) -> str:
    """Returns the table of planned trials."""
    lines = [["trial", "audio layers", "parameters", "steps", "FLOPs", "GiB", "hours"]]
    for row in rows:
        layers = " ".join(
            "all" if not stream else f"{stream[0]}-{stream[-1]} ({len(stream)})" for stream in row["audio_layers"]
        )
        lines.append([row["trial"], layers, f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['flops']:.3g}",
                      f"{row['memory_gib']:.3g}", f"{row['hours']:.3g}"])  # fmt: skip
    return format_table(lines)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
