"""The tables of an experiment: one row per run and benchmark, one per settings, one per task."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.experiments.trends import COSTS
from pipeline.tracking.reader import TrainedRun

NOT_COMPARED = ("output", "tracking.")  # parameters that differ between runs without being settings
FRONTS = {"peak_memory_gib": "memory", "samples_per_s": "speed"}

Row = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]  # headings, rows


def make_table(runs: Sequence[TrainedRun]) -> list[Row]:
    """Returns one row per run and benchmark as plain JSON; accuracies are 0 to 1, missing values None."""
    differing = differing_parameters(runs)
    domains = sorted({d for run in runs for scores in run.scored.values() for d in scores["by_domain"]})
    rows = []
    for run in runs:
        shared: Row = {"run": run.label, "run_id": run.run_id, "status": run.status}
        shared |= {key: run.params.get(key) for key in differing}
        shared |= {metric: run.metrics.get(metric) for metric in ("final_loss", *COSTS)}
        for benchmark, scores in run.evaluations.items() or [(None, None)]:
            rows.append(shared | {"benchmark": benchmark} | _scores_row(scores, domains))
            if scores and "wer" in scores:
                rows[-1] |= {"wer": scores["wer"], "wer_low": scores["wer_ci95"][0], "wer_high": scores["wer_ci95"][1]}
                rows[-1]["wer_whisper_english"] = scores.get("wer_whisper_english")
    return rows


def _scores_row(scores: Mapping[str, Any] | None, domains: Sequence[str]) -> Row:
    scores = {"accuracy": None, "ci95": (None, None), "by_domain": {}} | dict(scores or {})
    low, high = scores["ci95"]
    return {
        "accuracy": scores["accuracy"],
        "ci95_low": low,
        "ci95_high": high,
        **{f"accuracy_{domain}": scores["by_domain"].get(domain, {}).get("accuracy") for domain in domains},
        "swapped_audio_accuracy": scores.get("swapped_audio", {}).get("accuracy"),
        "majority_baseline_accuracy": scores.get("majority_baseline", {}).get("accuracy"),
        "unscored": scores.get("unscored", 0),
    }


def differing_parameters(runs: Sequence[TrainedRun]) -> list[str]:
    """Returns the parameters whose values are not the same in all runs."""
    keys = sorted({key for run in runs for key in run.params if not key.startswith(NOT_COMPARED)})
    return [key for key in keys if len({run.params.get(key) for run in runs}) > 1]


def write_csv(file: Path, rows: Sequence[Row]) -> Path:
    """Writes rows as CSV; returns the file."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return file


def comparison_cells(table: Sequence[Row]) -> Cells:
    """Returns the comparison of runs, for the terminal and for Markdown."""
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
    if any("wer" in row for row in table):
        columns["WER %\n(95 % interval)"] = _word_errors_cell
    columns["final\nloss"] = _number_cell("final_loss", ".3f")
    columns["questions\nper s"] = _number_cell("samples_per_s", ".1f")
    columns["peak\nGiB"] = _number_cell("peak_memory_gib", ".2f")
    return list(columns), [[cell(row) for cell in columns.values()] for row in table]


def pooled_cells(pooled: Sequence[Row]) -> Cells:
    """Returns the comparison of settings, each pooled over its seeds."""
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


def task_cells(runs: Sequence[TrainedRun], benchmark: str) -> Cells:
    """Returns the accuracy by task, and word error rates of transcriptions: one row per task, one column per run."""
    tasks = {run.label: run.scored[benchmark]["by_task"] for run in runs if benchmark in run.scored}
    names = sorted({task for scores in tasks.values() for task in scores})
    rows = [
        [name, *(_task_cell(scores[name]) if name in scores else "-" for scores in tasks.values())] for name in names
    ]
    return ["task", *(f"{label} %" for label in tasks)], rows


def _task_cell(scores: Mapping[str, Any]) -> str:
    accuracy = f"{100 * scores['accuracy']:.1f}"
    return f"{accuracy} (WER {100 * scores['wer']:.1f})" if "wer" in scores else accuracy


def _number_cell(column: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: "-" if row[column] is None else f"{scale * row[column]:{form}}"


def _percent_cell(column: str) -> Callable[[Row], str]:
    return _number_cell(column, ".1f", 100)


def _word_errors_cell(row: Row) -> str:
    if "wer" not in row:
        return "-"
    return f"{100 * row['wer']:.1f} ({100 * row['wer_low']:.1f} to {100 * row['wer_high']:.1f})"


def _accuracy_cell(row: Row) -> str:
    if row["accuracy"] is None:
        return "unscored" if row["unscored"] else "-"
    return f"{100 * row['accuracy']:.1f} ({100 * row['ci95_low']:.1f} to {100 * row['ci95_high']:.1f})"
