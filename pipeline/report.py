"""`pal report EXPERIMENT`: compares the runs of an MLflow experiment in a table, Markdown, CSV and figures.

Reads MLflow alone, so it reports runs of any machine, and logs the report back (unless `--no-log`): to the run of the
sweep, or to a run of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.arguments import add_json, write_results
from pipeline.core.errors import run_command

if TYPE_CHECKING:  # scipy takes seconds to import, which `--help` must not
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

    from pipeline.experiments.tables import Row
    from pipeline.tracking.reader import TrainedRun


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    from pipeline.experiments.run_report import write_report
    from pipeline.tracking.reader import log_back, open_experiment, read_runs

    out = arguments.out or Path("runs") / arguments.experiment / "report"
    client, experiment = open_experiment(arguments.experiment, arguments.uri)
    runs = read_runs(client, experiment)
    report = write_report(experiment.name, runs, out)
    files = list(report.files)
    if arguments.answers:
        files += _write_answers(arguments, client, experiment, runs)
    if not arguments.no_log:
        log_back(client, experiment, files)
    print_table(experiment.name, report.table)
    print(f"report: {out / 'report.md'}")
    results = {"table": report.table, "fits": report.fits, "files": [str(file) for file in files]}
    write_results(results, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal report", description="Compare the runs of an MLflow experiment in tables and figures."
    )
    parser.add_argument("experiment", help="name of the MLflow experiment")
    parser.add_argument("--uri", help="MLflow tracking URI (default: $MLFLOW_TRACKING_URI or sqlite:///runs/mlflow.db)")
    parser.add_argument("--no-log", action="store_true", help="do not log the report back to MLflow")
    parser.add_argument("--out", type=Path, help="folder for the report (default: runs/EXPERIMENT/report)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write the sweep's findings to this Markdown page")
    parser.add_argument(
        "--append", type=Path, nargs="*", default=[], metavar="FILE", help="Markdown files to append to --answers"
    )
    parser.add_argument("--command", default="pal report", help="command line to credit in that page")
    add_json(parser)
    return parser


def _write_answers(
    arguments: argparse.Namespace, client: MlflowClient, experiment: Experiment, runs: Sequence[TrainedRun]
) -> list[Path]:
    """Writes the answers to the questions of the experiment's sweep; returns the files written."""
    from pipeline.config import validate_config
    from pipeline.experiments.page import SweepResults, write_page
    from pipeline.experiments.trials import SweepConfig
    from pipeline.tracking.reader import read_correctness, read_sweep
    from pipeline.tracking.writer import SWEEP

    values, tags = read_sweep(client, experiment)
    sweep = validate_config(SweepConfig, values, SWEEP)
    results = SweepResults(sweep, tags, runs, lambda run, benchmark: read_correctness(client, run, benchmark))
    return write_page(arguments.answers, results, command=arguments.command, appended=arguments.append)


def print_table(experiment: str, table: Sequence[Row]) -> None:
    """Prints the comparison of runs."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from pipeline.experiments.tables import comparison_cells

    headings, rows = comparison_cells(table)
    view = Table(*headings, title=f"Experiment {experiment}", box=SIMPLE_HEAD)
    for column in view.columns[1:]:
        column.justify = "right"
    for row in rows:
        view.add_row(*row)
    console = Console()
    console.width = max(console.width, 200)  # on a narrow terminal lines may wrap, but no number is truncated
    console.print(view)


if __name__ == "__main__":
    sys.exit(run_command(main))
