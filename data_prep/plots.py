"""Plots the statistics of a feature set with matplotlib."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_prep.statistics import Statistics

COLOUR, OTHER = "#0072B2", ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MAX_BARS = 12


def draw(statistics: Statistics, title: str) -> Figure:
    """Draws durations, questions per clip, feature norms, clips by domain, questions by task and rejects by reason."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(2, 3)
    _histogram(axes[0, 0], {"": statistics.durations_s}, "Duration of the clips", "seconds")
    _whole_numbers(axes[0, 1], statistics.questions, "Questions per clip", "questions")
    _histogram(axes[0, 2], statistics.norms, "Size of the features", "root mean square of a clip's features")
    _bars(axes[1, 0], statistics.domains, "Clips by domain", "clips")
    _bars(axes[1, 1], statistics.tasks, "Questions by task", "questions")
    _bars(axes[1, 2], statistics.rejects, f"Rejected clips ({statistics.rejects.total()})", "clips")
    return figure


def _histogram(axes: Axes, series: dict[str, list[float]], title: str, unit: str) -> None:
    all_values = [value for values in series.values() for value in values]
    if not all_values:
        _empty(axes, title)
        return
    low, high = min(all_values), max(all_values)
    wide = low > 0 and high / low > 50  # clips from a tenth of a second to hours
    if wide:
        edges = [low * (high / low) ** (i / 40) for i in range(41)]
        axes.set_xscale("log")
    else:
        width = (high - low) / 40 or max(abs(high), 1.0) / 40
        edges = [low + width * i for i in range(41)]
    for (name, values), colour in zip(series.items(), (COLOUR, *OTHER), strict=False):
        kind: Literal["bar", "step"] = "step" if len(series) > 1 else "bar"
        axes.hist(values, bins=edges, label=name or None, color=colour, histtype=kind, linewidth=1.5)
    if any(series):
        axes.legend(frameon=False)
    axes.set(title=title, xlabel=f"{unit} (log scale)" if wide else unit, ylabel="clips")


def _whole_numbers(axes: Axes, values: list[int], title: str, unit: str) -> None:
    if not values:
        _empty(axes, title)
        return
    counts = Counter(values)
    axes.bar(list(counts), list(counts.values()), color=COLOUR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel=unit, ylabel="clips")


def _bars(axes: Axes, counts: Counter[str], title: str, unit: str) -> None:
    if not counts:
        _empty(axes, title)
        return
    shown = counts.most_common(MAX_BARS)
    remaining = counts.total() - sum(count for _, count in shown)
    if remaining:
        shown.append((f"{len(counts) - MAX_BARS} others", remaining))
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name, _ in shown]
    bars = axes.barh(range(len(shown)), [count for _, count in shown], color=COLOUR)
    axes.bar_label(bars, padding=3)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, 1.15 * max(count for _, count in shown))
    axes.set(title=title, xlabel=unit)


def _empty(axes: Axes, title: str) -> None:
    axes.set(title=title)
    axes.axis("off")
    axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
