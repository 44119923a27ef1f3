"""Figures of scaling experiments: accuracy and loss against a setting, and cost against the length of the audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pipeline.plots.style import COLOURS, DPI, LINE_STYLES, MARKERS, colour_of, new_figure


@dataclass(frozen=True)
class Line:
    """Accuracy against a setting.

    Attributes:
        points: value of the setting, accuracy (0 to 1) and the ends of its 95 % interval.
    """

    label: str
    points: Sequence[tuple[float, float, float, float]]


def plot_accuracy_by(lines: Sequence[Line], x_label: str, title: str) -> Figure:
    """Draws accuracy with its 95 % interval against a setting, one line per combination of the other settings."""
    figure, axes = new_figure(title, x_label, "accuracy (%), 95 % interval")
    for index, line in enumerate(lines):
        x, value, low, high = (np.array(column) for column in zip(*line.points, strict=True))
        axes.errorbar(
            x,
            value,
            yerr=[np.maximum(0, value - low), np.maximum(0, high - value)],
            fmt=MARKERS[index % len(MARKERS)] + LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)],
            color=colour_of(index),
            capsize=4,
            label=line.label,
        )
    values = [point[0] for line in lines for point in line.points]
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_xscale("log")
    elif all(float(value).is_integer() for value in values):  # such as numbers of layers
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.legend(frameon=False)
    return figure


@dataclass(frozen=True)
class Difference:
    """Accuracy of a variant minus that of the reference (-1 to 1): mean, ends of the 95 % interval, and each seed's."""

    label: str
    mean: float
    low: float
    high: float
    seeds: Sequence[float]


def plot_differences(rows: Sequence[Difference], reference: str, title: str) -> Figure:
    """Draws one row per variant: the mean difference with its 95 % interval, and small dots for the seeds."""
    figure = Figure(figsize=(7.5, 1.6 + 0.5 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}\ncompared with {reference}", fontsize=10)
    figure.supxlabel("difference in accuracy, percentage points (95 % interval; small dots: seeds)", fontsize=10)
    axes.axvline(0, color="black", linewidth=1)
    for position, row in enumerate(rows):
        ends = [[row.mean - row.low], [row.high - row.mean]]
        colour = colour_of(6 if row.low <= 0 <= row.high else 2 if row.low > 0 else 1)
        axes.errorbar(row.mean, position, xerr=ends, fmt="o", color=colour, markersize=7, capsize=4)
        axes.plot(row.seeds, [position + 0.25] * len(row.seeds), "o", color=colour, markersize=3, alpha=0.6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    axes.grid(True, axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_law(points: Sequence[tuple[float, float]], held_out: Mapping[str, Any], loss: str) -> Figure:
    """Draws loss against parameters on log scales, with the smaller sizes' prediction for the largest size.

    Args:
        points: parameters and loss of each run.
        held_out: `predicted` loss and its `interval` for the largest size, which was left out of the fit.
    """
    figure, axes = new_figure("Loss against parameters", "parameters (log scale)", f"{loss} (log scale)")
    largest = max(size for size, _ in points)
    for is_held_out, colour, label in ((False, 0, "fitted"), (True, 1, "held out")):
        chosen = [point for point in points if (point[0] == largest) == is_held_out]
        axes.plot(*zip(*chosen, strict=True), "o", color=colour_of(colour), markersize=5, alpha=0.8, label=label)
    low, high = held_out["interval"]
    value = held_out["predicted"]
    bar = [[value - low], [high - value]]
    label = "predicted (95 % interval of one run)"
    axes.errorbar(largest * 1.04, value, yerr=bar, fmt="D", color="black", capsize=5, markersize=5, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.legend(frameon=False)
    return figure


def plot_cost(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws seconds and FLOPs per training sample against the audio tokens of its clip, on log scales.

    Args:
        rows: rows of `pal bench integration`: `variant`, `num_audio_tokens`, `samples_per_s` (None: out of memory),
            `flops_per_sample`. Both axes span equally many decades, so that equal slopes look equal.
    """
    figure, axes = new_figure(title, "audio tokens of a clip (N_a)", "seconds per sample (measured)", width=8.5)
    right = axes.twinx()
    right.set_ylabel("GFLOPs per sample (counted)")
    right.spines["top"].set_visible(False)
    for index, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        variant_rows = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["num_audio_tokens"])
        fits = [r for r in variant_rows if r["samples_per_s"] is not None]
        style: dict[str, Any] = {"color": colour_of(index), "marker": MARKERS[index % len(MARKERS)]}
        axes.plot([r["num_audio_tokens"] for r in fits], [1 / r["samples_per_s"] for r in fits], label=variant, **style)
        counted = [r["flops_per_sample"] / 1e9 for r in variant_rows]
        right.plot([r["num_audio_tokens"] for r in variant_rows], counted, "--", color=colour_of(index), alpha=0.5)
    for side in (axes, right):
        side.set_xscale("log", base=2)
        side.set_yscale("log")
    ticks = sorted({row["num_audio_tokens"] for row in rows})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    decades = max(np.ptp(np.log10(side.get_ylim())) for side in (axes, right))
    for side in (axes, right):
        middle = np.mean(np.log10(side.get_ylim()))
        side.set_ylim(10 ** (middle - decades / 2), 10 ** (middle + decades / 2))
    axes.legend(title="solid: measured\ndashed: counted", loc="upper left", bbox_to_anchor=(1.14, 1), frameon=False)
    return figure
