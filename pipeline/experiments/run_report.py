"""Writes the report of an experiment: Markdown, CSV and figures of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline.core.console import markdown_table
from pipeline.experiments import tables, trends
from pipeline.experiments.tables import Row
from pipeline.tracking.reader import TrainedRun

if TYPE_CHECKING:  # takes seconds to import
    from matplotlib.figure import Figure

    from pipeline.plots import DomainAccuracy, Point

NOTES = """Accuracy is the percentage of correct answers on held-out clips, with its 95 % interval in brackets
(bootstrap by clip). *Swapped audio*: the same questions with the audio of another clip of the same domain, which shows
what the model answers without the right audio. *Majority baseline*: the most frequent training answer to the same
wording, which uses neither audio nor a model."""

POOLED_NOTES = """Runs that differ only in their seed are pooled; the interval covers seeds and clips. *Front*: on the
Pareto front, that is, no other setting is as accurate with less memory, or at a higher speed."""
MAX_CURVES = 12  # more loss curves cannot be told apart in one figure
COST_LABELS = {
    "peak_memory_gib": "peak training memory per rank (GiB)",
    "samples_per_s": "training throughput (questions/s)",
}


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        table: one row per run and benchmark.
        fits: fitted laws by integration.
        files: files written, report.md first.
    """

    table: list[Row]
    fits: dict[str, Any]
    files: list[Path]


def write_report(experiment: str, runs: Sequence[TrainedRun], out: Path) -> Report:
    """Writes report.md, report.csv, pooled.csv and the figures that the runs' metrics allow."""
    out.mkdir(parents=True, exist_ok=True)
    table, groups = tables.make_table(runs), trends.group_runs(runs)
    pooled, fits = trends.pooled_rows(groups), trends.fit_laws(groups)
    files = [out / "report.md", tables.write_csv(out / "report.csv", table)]
    if any(row["seeds"] > 1 for row in pooled):
        files.append(tables.write_csv(out / "pooled.csv", pooled))
    pictures = []
    for name, figure in (_figures(experiment, runs, pooled) | trends.trend_figures(experiment, groups)).items():
        pictures.append(out / f"{name}.png")
        figure.savefig(pictures[-1])
    parts = [f"# Experiment {experiment}", markdown_table(*tables.comparison_cells(table)), NOTES]
    if pooled:
        parts += ["## By settings", POOLED_NOTES, markdown_table(*tables.pooled_cells(pooled))]
    if fits:
        parts += ["## Fitted laws", *trends.describe_fits(fits)]
    parts += _details(runs)
    parts += [f"![{picture.stem.replace('_', ' ')}]({quote(picture.name)})" for picture in pictures]
    files[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return Report(table, fits, [*files, *pictures])


def _details(runs: Sequence[TrainedRun]) -> list[str]:
    """Returns the sections on differing parameters and on accuracy by task."""
    parts = []
    differing = tables.differing_parameters(runs)
    if differing:
        rows = [[run.label, *(run.params.get(key, "-") for key in differing)] for run in runs]
        parts += ["## Differences between the runs", markdown_table(["run", *differing], rows)]
    for benchmark in sorted({benchmark for run in runs for benchmark in run.scored}):
        parts += [f"## Accuracy by task: {benchmark}", markdown_table(*tables.task_cells(runs, benchmark))]
    return parts


def _figures(experiment: str, runs: Sequence[TrainedRun], pooled: Sequence[Row]) -> dict[str, Figure]:
    """Returns name -> figure: settings with several seeds are one point, and only a few runs have curves and bars."""
    from pipeline.plots import Curve, plot_accuracy_against, plot_accuracy_by_domain, plot_loss_curves

    figures = {}
    readable = len(runs) <= MAX_CURVES
    curves = [Curve(run.curve_label, *zip(*run.losses, strict=True)) for run in runs if run.losses]
    if curves and readable:
        figures["loss"] = plot_loss_curves(curves, f"Training loss: {experiment}")
    for benchmark in sorted({benchmark for run in runs for benchmark in run.scored}):
        evaluated = [run for run in runs if benchmark in run.scored]
        subject = f"{experiment}, {benchmark}"
        for cost, x_label in COST_LABELS.items():
            points = _points(evaluated, pooled, benchmark, cost)
            if points:
                title = f"Accuracy against {x_label.partition(' (')[0]}: {subject}"
                figures[f"accuracy_{cost}_{benchmark}"] = plot_accuracy_against(points, x_label, title)
        if not readable:
            continue
        accuracies = [_domain_accuracy(run.label, run.scored[benchmark]) for run in evaluated]
        baseline = evaluated[0].scored[benchmark].get("majority_baseline", {"by_domain": {}})["by_domain"]
        figures[f"accuracy_by_domain_{benchmark}"] = plot_accuracy_by_domain(
            accuracies,
            {domain: scores["accuracy"] for domain, scores in baseline.items()},
            f"Accuracy by domain: {subject}",
        )
    return figures


def _points(evaluated: Sequence[TrainedRun], pooled: Sequence[Row], benchmark: str, cost: str) -> list[Point]:
    """Returns one point per settings if any has several seeds, otherwise one per run."""
    from pipeline.plots import Point

    if any(row["seeds"] > 1 for row in pooled):
        rows = [row for row in pooled if row["benchmark"] == benchmark and row[cost] is not None]
        return [Point(row["settings"], row[cost], row["accuracy"], row["ci95_low"], row["ci95_high"]) for row in rows]
    scores = [(run, run.scored[benchmark]) for run in evaluated if cost in run.metrics]
    return [Point(run.label, run.metrics[cost], score["accuracy"], *score["ci95"]) for run, score in scores]


def _domain_accuracy(label: str, scores: Mapping[str, Any]) -> DomainAccuracy:
    from pipeline.plots import DomainAccuracy

    own_audio, swapped_audio = (
        {domain: (group["accuracy"], *group["ci95"]) for domain, group in part["by_domain"].items()}
        for part in (scores, scores.get("swapped_audio", {"by_domain": {}}))
    )
    return DomainAccuracy(label, own_audio, swapped_audio)
