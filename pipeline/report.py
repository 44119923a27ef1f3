"""`pal report EXPERIMENT`: the runs of one experiment as a table, Markdown, CSV and pictures.

Reads MLflow and nothing else, so it reports runs of any machine; what it writes is logged back to the sweep's run, or
as a run of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.console import markdown_table
from pipeline.core.errors import run_command
from pipeline.experiments import trends
from pipeline.tracking.reader import TrainedRun, log_back, open_experiment, read_correctness, read_runs, read_sweep

if TYPE_CHECKING:  # matplotlib takes seconds to import, which `--help` must not
    from matplotlib.figure import Figure

    from pipeline.plots import Bars, Point

NOT_COMPARED = ("output", "tracking.")  # parameters that differ from run to run without meaning

NOTES = """Accuracy is the share of exact matches on held-out clips, in brackets its 95 % interval (bootstrap by clip).
*Swapped audio*: the same questions asked about another clip of the same domain, what the model knows without hearing.
*Commonest answer*: the commonest training answer to the same wording, which takes no model at all."""

POOLED_NOTES = """Runs that differ in their seed alone, together; the interval is over seeds and clips. *Front*: no
other setting is as accurate at less memory, or at more speed."""
MOST_CURVES = 12  # that a person can tell apart in one picture
FRONTS = {"peak_memory_gib": "memory", "samples_per_s": "speed"}

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    out = arguments.out or Path("runs") / arguments.experiment / "report"
    client, experiment = open_experiment(arguments.experiment, arguments.uri)
    runs = read_runs(client, experiment)
    table, fits, files = write_report(experiment.name, runs, out)
    if arguments.answers:
        from pipeline.config import validate_config
        from pipeline.experiments.page import write_page
        from pipeline.experiments.trials import SweepConfig
        from pipeline.tracking.writer import SWEEP

        values, tags = read_sweep(client, experiment)
        sweep = validate_config(SweepConfig, values, SWEEP)
        files += write_page(
            arguments.answers,
            sweep,
            tags,
            runs,
            lambda run, benchmark: read_correctness(client, run, benchmark),
            command=arguments.command,
            appended=arguments.append,
        )
    log_back(client, experiment, files)
    print_table(experiment.name, table)
    print(f"report: {out / 'report.md'}")
    if arguments.json:
        results = {"table": table, "fits": fits, "files": [str(file) for file in files]}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal report", description="Tables and pictures of an experiment, from MLflow."
    )
    parser.add_argument("experiment", help="name of the MLflow experiment")
    parser.add_argument("--uri", help="MLflow tracking URI (default: $MLFLOW_TRACKING_URI or sqlite:///runs/mlflow.db)")
    parser.add_argument("--out", type=Path, help="folder to write (default: runs/EXPERIMENT/report)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write what a sweep's questions are answered with")
    parser.add_argument(
        "--append", type=Path, nargs="*", default=[], metavar="FILE", help="Markdown to end --answers with"
    )
    parser.add_argument("--command", default="pal report", help="what reproduces --answers, told in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def make_table(runs: Sequence[TrainedRun]) -> list[Row]:
    """One row per run and benchmark, plain JSON; accuracies are 0 to 1, absent values None."""
    differing = _differing_parameters(runs)
    domains = sorted({d for run in runs for scores in run.evaluations.values() for d in scores["by_domain"]})
    rows = []
    for run in runs:
        shared: Row = {"run": run.label, "run_id": run.run_id, "status": run.status}
        shared |= {key: run.params.get(key) for key in differing}
        shared |= {metric: run.metrics.get(metric) for metric in ("final_loss", *trends.COSTS)}
        for benchmark, scores in run.evaluations.items() or [(None, None)]:
            rows.append(shared | {"benchmark": benchmark} | _scores_row(scores, domains))
    return rows


def _scores_row(scores: Mapping[str, Any] | None, domains: Sequence[str]) -> Row:
    if scores is None:
        scores = {"accuracy": None, "ci95": (None, None), "by_domain": {}}
    low, high = scores["ci95"]
    return {
        "accuracy": scores["accuracy"],
        "ci95_low": low,
        "ci95_high": high,
        **{f"accuracy_{domain}": scores["by_domain"].get(domain, {}).get("accuracy") for domain in domains},
        "swapped_audio_accuracy": scores.get("swapped_audio", {}).get("accuracy"),
        "majority_baseline_accuracy": scores.get("majority_baseline", {}).get("accuracy"),
    }


def _differing_parameters(runs: Sequence[TrainedRun]) -> list[str]:
    """What the experiment varied: parameters whose values are not the same in all runs."""
    keys = sorted({key for run in runs for key in run.params if not key.startswith(NOT_COMPARED)})
    return [key for key in keys if len({run.params.get(key) for run in runs}) > 1]


def write_report(
    experiment: str, runs: Sequence[TrainedRun], out: Path
) -> tuple[list[Row], dict[str, Any], list[Path]]:
    """Writes report.md, report.csv, pooled.csv and the pictures that the runs' figures allow.

    Returns:
        the table, the fitted laws, and the files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    table, groups = make_table(runs), trends.group_runs(runs)
    pooled, fits = trends.pooled_rows(groups), trends.fit_laws(groups)
    files = [out / "report.md", _write_csv(out / "report.csv", table)]
    if any(row["seeds"] > 1 for row in pooled):
        files.append(_write_csv(out / "pooled.csv", pooled))
    pictures = []
    for name, figure in (_pictures(experiment, runs, pooled) | trends.trend_figures(experiment, groups)).items():
        pictures.append(out / f"{name}.png")
        figure.savefig(pictures[-1])
    files[0].write_text(_markdown(experiment, runs, table, pooled, fits, pictures), encoding="utf-8")
    return table, fits, [*files, *pictures]


def _write_csv(file: Path, rows: Sequence[Row]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return file


def _pictures(experiment: str, runs: Sequence[TrainedRun], pooled: Sequence[Row]) -> dict[str, Figure]:
    """What the runs' figures allow: of settings with several seeds one point, of more than a few runs no curves."""
    from pipeline.plots import Curve, Point, plot_accuracy_against, plot_accuracy_by_domain, plot_loss_curves

    figures = {}
    readable = len(runs) <= MOST_CURVES
    curves = [Curve(run.label, *zip(*run.losses, strict=True)) for run in runs if run.losses]
    if curves and readable:
        figures["loss"] = plot_loss_curves(curves, f"Training loss: {experiment}")
    for benchmark in sorted({benchmark for run in runs for benchmark in run.evaluations}):
        evaluated = [run for run in runs if benchmark in run.evaluations]
        of = f"{experiment}, {benchmark}"
        for cost, x_label in (
            ("peak_memory_gib", "peak training memory per rank (GiB)"),
            ("samples_per_s", "training throughput (questions/s)"),
        ):
            if any(row["seeds"] > 1 for row in pooled):
                rows = [row for row in pooled if row["benchmark"] == benchmark and row[cost] is not None]
                ends = "accuracy", "ci95_low", "ci95_high"
                points = [Point(row["settings"], row[cost], *(row[end] for end in ends)) for row in rows]
            else:
                points = [_point(run, benchmark, cost) for run in evaluated if cost in run.metrics]
            if points:
                name = x_label.partition(" (")[0]
                figures[f"accuracy_{cost}_{benchmark}"] = plot_accuracy_against(
                    points, x_label, f"Accuracy against {name}: {of}"
                )
        if not readable:
            continue
        bars = [_bars(run.label, run.evaluations[benchmark]) for run in evaluated]
        guess = evaluated[0].evaluations[benchmark].get("majority_baseline", {"by_domain": {}})["by_domain"]
        figures[f"accuracy_by_domain_{benchmark}"] = plot_accuracy_by_domain(
            bars, {domain: scores["accuracy"] for domain, scores in guess.items()}, f"Accuracy by domain: {of}"
        )
    return figures


def _point(run: TrainedRun, benchmark: str, cost: str) -> Point:
    from pipeline.plots import Point

    scores = run.evaluations[benchmark]
    return Point(run.label, run.metrics[cost], scores["accuracy"], *scores["ci95"])


def _bars(label: str, scores: Mapping[str, Any]) -> Bars:
    from pipeline.plots import Bars

    heard, swapped = (
        {domain: (group["accuracy"], *group["ci95"]) for domain, group in part["by_domain"].items()}
        for part in (scores, scores.get("swapped_audio", {"by_domain": {}}))
    )
    return Bars(label, heard, swapped)


def _cells(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and texts of what a person compares; the terminal and the Markdown file show the same."""
    domains = [c.removeprefix("accuracy_") for c in table[0] if c.startswith("accuracy_")]
    columns: dict[str, Callable[[Row], str]] = {"run": lambda row: row["run"]}
    if any(row["status"] != "FINISHED" for row in table):
        columns["status"] = lambda row: row["status"]
    if len({row["benchmark"] for row in table}) > 1:
        columns["benchmark"] = lambda row: row["benchmark"] or "-"
    columns["accuracy %\n(95 % interval)"] = _accuracy_cell
    columns |= {f"{domain}\n%": _percent_cell(f"accuracy_{domain}") for domain in domains}
    columns["swapped\naudio %"] = _percent_cell("swapped_audio_accuracy")
    columns["majority\nbaseline %"] = _percent_cell("majority_baseline_accuracy")
    columns["final\nloss"] = _number_cell("final_loss", ".3f")
    columns["questions\nper s"] = _number_cell("samples_per_s", ".1f")
    columns["peak\nGiB"] = _number_cell("peak_memory_gib", ".2f")
    return list(columns), [[cell(row) for cell in columns.values()] for row in table]


def _number_cell(column: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: "-" if row[column] is None else f"{scale * row[column]:{form}}"


def _percent_cell(column: str) -> Callable[[Row], str]:
    return _number_cell(column, ".1f", 100)


def _accuracy_cell(row: Row) -> str:
    if row["accuracy"] is None:
        return "-"
    return f"{100 * row['accuracy']:.1f} ({100 * row['ci95_low']:.1f} to {100 * row['ci95_high']:.1f})"


def print_table(experiment: str, table: Sequence[Row]) -> None:
    """The comparison on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    headings, rows = _cells(table)
    view = Table(*headings, title=f"Experiment {experiment}", box=SIMPLE_HEAD)
    for column in view.columns[1:]:
        column.justify = "right"
    for row in rows:
        view.add_row(*row)
    console = Console()
    console.width = max(console.width, 200)  # a narrow terminal may break a line, but no figure is cut off
    console.print(view)


def _markdown(
    experiment: str,
    runs: Sequence[TrainedRun],
    table: Sequence[Row],
    pooled: Sequence[Row],
    fits: Mapping[str, Any],
    pictures: Sequence[Path],
) -> str:
    parts = [f"# Experiment {experiment}", markdown_table(*_cells(table)), NOTES]
    if pooled:
        parts += ["## By settings", POOLED_NOTES, markdown_table(*_pooled_cells(pooled))]
    if fits:
        parts += ["## Fitted laws", *trends.describe_fits(fits)]
    differing = _differing_parameters(runs)
    if differing:
        rows = [[run.label, *(run.params.get(key, "-") for key in differing)] for run in runs]
        parts += ["## What differs between the runs", markdown_table(["run", *differing], rows)]
    for benchmark in sorted({benchmark for run in runs for benchmark in run.evaluations}):
        parts += [f"## Accuracy by task: {benchmark}", markdown_table(*_task_cells(runs, benchmark))]
    parts += [f"![{picture.stem.replace('_', ' ')}]({picture.name})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def _pooled_cells(pooled: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, Callable[[Row], str]] = {
        "settings": lambda row: row["settings"],
        "benchmark": lambda row: row["benchmark"],
        "seeds": lambda row: str(row["seeds"]),
        "accuracy %\n(95 % interval)": _accuracy_cell,
        "final\nloss": _number_cell("final_loss", ".3f"),
        "peak\nGiB": _number_cell("peak_memory_gib", ".2f"),
        "questions\nper s": _number_cell("samples_per_s", ".1f"),
        "front": lambda row: ", ".join(name for cost, name in FRONTS.items() if row.get(f"front_{cost}")) or "-",
    }
    return list(columns), [[cell(row) for cell in columns.values()] for row in pooled]


def _task_cells(runs: Sequence[TrainedRun], benchmark: str) -> tuple[list[str], list[list[str]]]:
    """Tasks down, runs across."""
    tasks = {run.label: run.evaluations[benchmark]["by_task"] for run in runs if benchmark in run.evaluations}
    names = sorted({task for scores in tasks.values() for task in scores})
    rows = [
        [name, *(f"{100 * scores[name]['accuracy']:.1f}" if name in scores else "-" for scores in tasks.values())]
        for name in names
    ]
    return ["task", *(f"{label} %" for label in tasks)], rows


if __name__ == "__main__":
    sys.exit(run_command(main))
