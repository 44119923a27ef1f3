"""Figures of runs: losses, accuracies, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Bbox

from pipeline.plots.style import COLOURS, DPI, LINE_STYLES, MARKERS, colour_of, new_figure

MAX_LABELLED_POINTS = 8  # more names than this do not fit beside their points
SMOOTHING_FRACTION = 0.04  # window of a loss curve's running mean, as a fraction of the run's points


@dataclass(frozen=True)
class Curve:
    """The loss of one run (nats per answer token) by optimizer step."""

    label: str
    steps: Sequence[float]
    losses: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One run in an accuracy plot; `low` and `high` are the ends of the 95 % interval (all accuracies 0 to 1)."""

    label: str
    x: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class DomainAccuracy:
    """Accuracy of one run by domain.

    Attributes:
        accuracy: domain -> accuracy and the ends of its 95 % interval (0 to 1).
        swapped_audio: the same with the audio swapped between clips; may be empty.
    """

    label: str
    accuracy: Mapping[str, tuple[float, float, float]]
    swapped_audio: Mapping[str, tuple[float, float, float]]


def plot_loss_curves(curves: Sequence[Curve], title: str) -> Figure:
    """Draws loss against step on a log scale: each run's running mean, and its single steps behind it."""
    figure, axes = new_figure(title, "optimizer step", "training loss (nats per answer token, log scale)")
    longest_window = 1
    for index, curve in enumerate(curves):
        colour, style = colour_of(index), LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        window = max(1, round(SMOOTHING_FRACTION * len(curve.losses)))
        longest_window = max(longest_window, window)
        axes.plot(curve.steps, curve.losses, color=colour, alpha=0.18, linewidth=0.8)
        mean = _running_mean(curve.losses, window)
        marker = "o" if len(curve.losses) == 1 else None  # a line through one point is invisible
        axes.plot(curve.steps, mean, style, color=colour, linewidth=2, marker=marker, label=curve.label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.legend(title=f"mean of {longest_window} points" if longest_window > 1 else None, frameon=False)
    return figure


def plot_accuracy_against(points: Sequence[Point], x_label: str, title: str) -> Figure:
    """Draws accuracy with its 95 % interval against memory or speed.

    A few points have their names beside them, many points in a legend.
    """
    many = len(points) > MAX_LABELLED_POINTS
    figure, axes = new_figure(title, x_label, "accuracy (%), 95 % interval", width=11.0 if many else 7.0)
    for index, point in enumerate(points):
        axes.errorbar(
            point.x,
            point.accuracy,
            yerr=[[max(0.0, point.accuracy - point.low)], [max(0.0, point.high - point.accuracy)]],
            fmt=MARKERS[index % len(MARKERS)],
            color=colour_of(index),
            markersize=9,
            capsize=5,
            label=point.label,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    lowest, highest = min(point.x for point in points), max(point.x for point in points)
    if many and lowest > highest / 2:  # on an axis from 0 the points would overlap
        margin = 0.15 * (highest - lowest) or 0.05 * highest
        axes.set_xlim(lowest - margin, highest + margin)
    else:
        axes.set_xlim(0, 1.15 * highest if highest > 0 else 1)
    _pad_accuracy_axis(axes, points)
    if many:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    else:
        _label_points(FigureCanvasAgg(figure), axes, points)
    return figure


def plot_accuracy_by_domain(
    runs: Sequence[DomainAccuracy], majority_baseline: Mapping[str, float], title: str
) -> Figure:
    """Draws bars by domain, solid with the clip's own audio and hatched with another clip's, and the majority baseline
    as a line.

    Args:
        majority_baseline: domain -> accuracy of the most frequent training answer (0 to 1), which uses no audio.
    """
    domains = sorted({domain for run in runs for domain in run.accuracy})
    figure, axes = new_figure(title, "domain", "accuracy (%), 95 % interval", width=max(7.0, 2.2 + 2.3 * len(domains)))
    slot = 0.8 / len(runs)
    for index, run in enumerate(runs):
        for part, (values, hatch) in enumerate(((run.accuracy, None), (run.swapped_audio, "////"))):
            for position, domain in enumerate(domains):
                if domain not in values:
                    continue
                value, low, high = values[domain]
                axes.bar(
                    position - 0.4 + slot * (index + (0.3 if part == 0 else 0.75)),
                    value,
                    width=slot * 0.42,
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    capsize=2.5,
                    error_kw={"linewidth": 1},
                    color=colour_of(index) if part == 0 else "white",
                    edgecolor=colour_of(index),
                    hatch=hatch,
                    label=run.label + (", swapped audio" if part else "") if position == 0 else "",
                )
    for position, domain in enumerate(domains):
        if domain in majority_baseline:
            label = "majority baseline" if position == 0 else ""
            ends = (position - 0.45, position + 0.45)
            axes.hlines(majority_baseline[domain], *ends, colors="black", linestyles="--", linewidth=1.5, label=label)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _running_mean(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """Returns the mean of the last `window` values at each point, of fewer values at the start."""
    sums = np.cumsum(np.asarray(values, dtype=np.float64))
    ends = np.arange(len(sums))
    starts = ends - window
    return (sums - np.where(starts >= 0, sums[np.maximum(starts, 0)], 0.0)) / np.minimum(ends + 1, window)


def _pad_accuracy_axis(axes: Axes, points: Sequence[Point]) -> None:
    low, high = min(point.low for point in points), max(point.high for point in points)
    margin = max(0.02, 0.15 * (high - low))
    low, high = max(-0.03, low - margin), min(1.03, high + margin)  # room for markers at 0 and at 100 %
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in axes.get_yticks() if max(0, low) <= tick <= min(1, high)])


def _label_points(canvas: FigureCanvasAgg, axes: Axes, points: Sequence[Point]) -> None:
    """Writes each label at the first position around its point where it covers no other label, point or error bar."""
    canvas.draw()  # settles the layout, on which the pixel coordinates depend
    unit = DPI / 72  # pixels per typographic point: offsets are in points, boxes in pixels
    occupied = [_marker_box(axes, point, radius=7 * unit) for point in points]
    frame = axes.get_window_extent()
    for point in points:
        label = axes.annotate(
            point.label,
            (point.x, point.accuracy),
            (0, 0),
            textcoords="offset points",
            va="bottom",
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.5},
        )
        label.set_in_layout(False)
        label.update_positions(canvas.get_renderer())
        size = Text.get_window_extent(label, canvas.get_renderer())  # without the line to its point
        candidates = [
            corner
            for distance in (10, 18, 28, 40, 54)
            for corner in _around(distance, size.width / unit, size.height / unit)
        ]
        boxes = [size.translated(dx * unit, dy * unit) for dx, dy in candidates]
        clashes = [_count_clashes(box, occupied, frame) for box in boxes]
        best = clashes.index(min(clashes))
        label.set_position(candidates[best])
        occupied.append(boxes[best])


def _around(distance: float, width: float, height: float) -> list[tuple[float, float]]:
    """Returns lower left corners of a label, in points from its data point: right, left, above, below, diagonal."""
    right, left, middle = distance, -distance - width, -width / 2
    above, below, level = distance, -distance - height, -height / 2
    corners = [(x, y) for x in (right, left) for y in (above, below)]
    return [(right, level), (left, level), (middle, above), (middle, below), *corners]


def _marker_box(axes: Axes, point: Point, radius: float) -> Bbox:
    low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
    return Bbox.from_extents(low[0] - radius, low[1] - radius, high[0] + radius, high[1] + radius)


def _count_clashes(box: Bbox, occupied: Sequence[Bbox], frame: Bbox) -> int:
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    return sum(box.overlaps(other) for other in occupied) + 10 * outside
