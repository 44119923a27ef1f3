"""The pictures of a report. The one door to matplotlib; knows numbers and labels, not where they come from.

Every function returns a figure; `figure.savefig(path)` writes it. Nothing global (pyplot) is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Bbox

# Okabe and Ito's palette, told apart under every common colour blindness; the yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINE_STYLES = ("-", "--", "-.", ":")
DPI = 150
SMOOTHING_SHARE = 0.04  # of a run's points make up the running mean of its loss curve


@dataclass(frozen=True)
class Curve:
    """The loss of one run, nats per answer token, by optimizer step."""

    label: str
    steps: Sequence[float]
    losses: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One run in an accuracy plot; `low` and `high` bound the 95 % interval of its accuracy (all 0 to 1)."""

    label: str
    x: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Bars:
    """Accuracies of one run by domain (0 to 1), and of the same run with the audio swapped between clips."""

    label: str
    accuracy: Mapping[str, tuple[float, float, float]]  # domain -> value, low, high
    swapped_audio: Mapping[str, tuple[float, float, float]]


def plot_loss_curves(curves: Sequence[Curve], title: str) -> Figure:
    """Loss against step, log scale: each run's running mean, its single steps behind it."""
    figure, axes = _new_figure(title, "optimizer step", "training loss (nats per answer token, log scale)")
    longest = 1
    for index, curve in enumerate(curves):
        colour, style = _colour(index), LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        window = max(1, round(SMOOTHING_SHARE * len(curve.losses)))
        longest = max(longest, window)
        axes.plot(curve.steps, curve.losses, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(curve.steps, _running_mean(curve.losses, window), style, color=colour, linewidth=2, label=curve.label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.legend(title=f"mean of {longest} points" if longest > 1 else None, frameon=False)
    return figure


def plot_accuracy_against(points: Sequence[Point], x_label: str, title: str) -> Figure:
    """Accuracy with its 95 % interval against what it costs or how fast it goes; every point carries its name."""
    figure, axes = _new_figure(title, x_label, "accuracy (%), 95 % interval")
    for index, point in enumerate(points):
        axes.errorbar(
            point.x,
            point.accuracy,
            yerr=[[max(0.0, point.accuracy - point.low)], [max(0.0, point.high - point.accuracy)]],
            fmt=MARKERS[index % len(MARKERS)],
            color=_colour(index),
            markersize=9,
            capsize=5,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    highest = max(point.x for point in points)
    axes.set_xlim(0, 1.15 * highest if highest > 0 else 1)
    _pad_accuracy_axis(axes, points)
    _label_points(FigureCanvasAgg(figure), axes, points)
    return figure


@dataclass(frozen=True)
class Line:
    """Accuracy along a setting: its value, accuracy and the ends of the 95 % interval (0 to 1) of each point."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


def plot_accuracy_by(lines: Sequence[Line], x_label: str, title: str) -> Figure:
    """Accuracy with its 95 % interval against a setting, a line for each combination of the others."""
    figure, axes = _new_figure(title, x_label, "accuracy (%), 95 % interval")
    for index, line in enumerate(lines):
        x, value, low, high = (np.array(column) for column in zip(*line.points, strict=True))
        axes.errorbar(
            x,
            value,
            yerr=[np.maximum(0, value - low), np.maximum(0, high - value)],
            fmt=MARKERS[index % len(MARKERS)] + LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)],
            color=_colour(index),
            capsize=4,
            label=line.label,
        )
    values = [point[0] for line in lines for point in line.points]
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.legend(frameon=False)
    return figure


@dataclass(frozen=True)
class Difference:
    """Accuracy of one setting less that of the reference (-1 to 1): mean, ends of the 95 % interval, each seed's."""

    label: str
    mean: float
    low: float
    high: float
    seeds: Sequence[float]


def plot_differences(rows: Sequence[Difference], reference: str, title: str) -> Figure:
    """Settings below each other: mean difference with its 95 % interval and, small, each seed's."""
    figure = Figure(figsize=(7.5, 1.6 + 0.5 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}\nagainst {reference}", fontsize=10)
    axes.set_xlabel("difference in accuracy, points (95 % interval; small: each seed)")
    axes.axvline(0, color="black", linewidth=1)
    for place, row in enumerate(rows):
        ends = [[row.mean - row.low], [row.high - row.mean]]
        colour = _colour(6 if row.low <= 0 <= row.high else 2 if row.low > 0 else 1)
        axes.errorbar(row.mean, place, xerr=ends, fmt="o", color=colour, markersize=7, capsize=4)
        axes.plot(row.seeds, [place + 0.25] * len(row.seeds), "o", color=colour, markersize=3, alpha=0.6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.grid(True, axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_law(points: Sequence[tuple[float, float]], held_out: Mapping[str, Any], loss: str) -> Figure:
    """Loss against parameters, log scales, and what the smaller sizes predict for the largest.

    Args:
        points: parameters and loss of each run.
        held_out: `predicted` and `interval` for the largest size, which they were not fitted to.
    """
    figure, axes = _new_figure("Loss against parameters", "parameters (log scale)", f"{loss} (log scale)")
    largest = max(size for size, _ in points)
    for own, colour, label in ((False, 0, "fitted"), (True, 1, "held out")):
        chosen = [point for point in points if (point[0] == largest) == own]
        axes.plot(*zip(*chosen, strict=True), "o", color=_colour(colour), markersize=5, alpha=0.8, label=label)
    low, high = held_out["interval"]
    value = held_out["predicted"]
    bar = [[value - low], [high - value]]
    label = "predicted, 95 % interval of one run"
    axes.errorbar(largest * 1.04, value, yerr=bar, fmt="D", color="black", capsize=5, markersize=5, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.legend(frameon=False)
    return figure


def plot_accuracy_by_domain(runs: Sequence[Bars], commonest_answer: Mapping[str, float], title: str) -> Figure:
    """Bars by domain: solid with the clip's own audio, hatched with another clip's; a line for the guess that never
    listens.

    Args:
        commonest_answer: domain -> accuracy of the commonest training answer (0 to 1).
    """
    domains = sorted({domain for run in runs for domain in run.accuracy})
    figure, axes = _new_figure(title, "domain", "accuracy (%), 95 % interval", width=max(7.0, 2.2 + 2.3 * len(domains)))
    slot = 0.8 / len(runs)
    for index, run in enumerate(runs):
        for part, (values, hatch) in enumerate(((run.accuracy, None), (run.swapped_audio, "////"))):
            for place, domain in enumerate(domains):
                if domain not in values:
                    continue
                value, low, high = values[domain]
                axes.bar(
                    place - 0.4 + slot * (index + (0.3 if part == 0 else 0.75)),
                    value,
                    width=slot * 0.42,
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    capsize=2.5,
                    error_kw={"linewidth": 1},
                    color=_colour(index) if part == 0 else "white",
                    edgecolor=_colour(index),
                    hatch=hatch,
                    label=run.label + (", swapped audio" if part else "") if place == 0 else "",
                )
    for place, domain in enumerate(domains):
        if domain in commonest_answer:
            guess = commonest_answer[domain]
            label = "commonest answer" if place == 0 else ""
            axes.hlines(guess, place - 0.45, place + 0.45, colors="black", linestyles="--", linewidth=1.5, label=label)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def plot_cost(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Seconds and counted operations of a training sample against the audio tokens of its clip, log scales.

    Args:
        rows: of `pal bench integration`: `variant`, `num_audio_tokens`, `samples_per_s` (None: did not fit),
            `flops_per_sample`. The two axes span equally many decades, so equal slopes look equal.
    """
    figure, axes = _new_figure(title, "audio tokens of a clip (N_a)", "measured seconds per sample", width=8.5)
    right = axes.twinx()
    right.set_ylabel("counted GFLOP per sample")
    right.spines["top"].set_visible(False)
    for index, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        own = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["num_audio_tokens"])
        fits = [r for r in own if r["samples_per_s"] is not None]
        style: dict[str, Any] = {"color": _colour(index), "marker": MARKERS[index % len(MARKERS)]}
        axes.plot([r["num_audio_tokens"] for r in fits], [1 / r["samples_per_s"] for r in fits], label=variant, **style)
        counted = [r["flops_per_sample"] / 1e9 for r in own]
        right.plot([r["num_audio_tokens"] for r in own], counted, "--", color=_colour(index), alpha=0.5)
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


def _new_figure(title: str, x_label: str, y_label: str, width: float = 7.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _running_mean(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """Mean over the last `window` values; over those there are, at the start."""
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
    """Writes each label at the first place around its point where it covers no other label, point or error bar."""
    canvas.draw()  # settles the layout, so that pixels mean what they will mean on paper
    unit = DPI / 72  # offsets are in typographic points, boxes in pixels
    taken = [_marker_box(axes, point, radius=7 * unit) for point in points]
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
        size = Text.get_window_extent(label, canvas.get_renderer())  # without its line
        candidates = [
            corner
            for distance in (10, 18, 28, 40, 54)
            for corner in _around(distance, size.width / unit, size.height / unit)
        ]
        boxes = [size.translated(dx * unit, dy * unit) for dx, dy in candidates]
        clashes = [_clashes(box, taken, frame) for box in boxes]
        best = clashes.index(min(clashes))
        label.set_position(candidates[best])
        taken.append(boxes[best])


def _around(distance: float, width: float, height: float) -> list[tuple[float, float]]:
    """Lower left corners of a label (points, from its point): right, left, above, below, then the corners."""
    right, left, middle = distance, -distance - width, -width / 2
    above, below, level = distance, -distance - height, -height / 2
    corners = [(x, y) for x in (right, left) for y in (above, below)]
    return [(right, level), (left, level), (middle, above), (middle, below), *corners]


def _marker_box(axes: Axes, point: Point, radius: float) -> Bbox:
    low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
    return Bbox.from_extents(low[0] - radius, low[1] - radius, high[0] + radius, high[1] + radius)


def _clashes(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> int:
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    return sum(box.overlaps(other) for other in taken) + 10 * outside


def plot_attention_by_layer(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Shares of text, LAL and PLITS in each layer's attention, stacked.

    Args:
        rows: of `pal probe`: `layer`, `text`, `lal`, `plits` (0 to 1, sum 1).
    """
    figure, axes = _new_figure(title, "layer", "attention of the answer's tokens (%)")
    layers = [row["layer"] for row in rows]
    bottom = np.zeros(len(rows))
    for kind, label, colour in (("lal", "LAL", 0), ("plits", "PLITS", 1), ("text", "text", 6)):
        share = np.array([row[kind] for row in rows])
        axes.bar(layers, share, bottom=bottom, color=_colour(colour), alpha=0.25 if kind == "text" else 1, label=label)
        bottom += share
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def plot_attention_by_head(shares: Mapping[str, Sequence[Sequence[float]]], title: str) -> Figure:
    """Heat maps of layers and heads, one for each pathway; shares[pathway][layer][head] from 0 to 1, one scale."""
    figure = Figure(figsize=(1.5 + 4.5 * len(shares), 4.6), dpi=DPI, layout="constrained")
    figure.suptitle(title)
    highest = max(float(np.max(values)) for values in shares.values())
    panels = figure.subplots(1, len(shares), squeeze=False)[0]
    for axes, (name, values) in zip(panels, shares.items(), strict=True):
        shown = np.ma.masked_equal(np.asarray(values), 0)  # a layer without this pathway stays white
        image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=highest, origin="lower")
        axes.set(title=name.upper(), xlabel="head", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1, symbol=""))
    bar.set_label("share of the head's attention (%)")
    return figure


def plot_spectrogram(spectrogram: npt.NDArray[np.float32], duration_s: float, highest_hz: float, title: str) -> Figure:
    """Log-mel spectrogram of a clip, over seconds and kHz.

    Args:
        spectrogram: (columns, mel bins) of the whole clip.
        highest_hz: where the bins end that begin at 0 Hz, evenly on the mel scale (HTK's).
    """
    figure = Figure(figsize=(8.5, 4.0), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    extent = (0, duration_s, 0, _mel(highest_hz))
    axes.imshow(spectrogram.T, aspect="auto", origin="lower", cmap="gray_r", extent=extent)
    khz = [f for f in (0, 0.5, 1, 2, 4, 8, 16) if 1000 * f <= highest_hz]
    axes.set_yticks([_mel(1000 * f) for f in khz], [f"{f:g}" for f in khz])
    axes.set(title=title, xlabel="time (s)", ylabel="frequency (kHz, mel scale)")
    return figure


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def plot_listening(
    spectrogram: npt.NDArray[np.float32],
    duration_s: float,
    highest_hz: float,
    moments: Mapping[str, npt.NDArray[np.float32]],
    title: str,
) -> Figure:
    """Where in a clip an answer's tokens look, over its spectrogram.

    Args:
        spectrogram, duration_s, highest_hz: see `plot_spectrogram`.
        moments: pathway -> attention to each of its tokens, in order of time, evenly over the clip.
    """
    figure = plot_spectrogram(spectrogram, duration_s, highest_hz, title)
    right = figure.axes[0].twinx()
    right.set_ylabel("attention (1 = even over the clip)")
    for index, (name, weights) in enumerate(moments.items()):
        edges = np.linspace(0, duration_s, len(weights) + 1)
        density = weights / max(float(weights.mean()), 1e-12)
        right.stairs(density, edges, color=_colour(index), linewidth=2, label=name)
        right.stairs(density, edges, color=_colour(index), fill=True, alpha=0.12)
    right.set_xlim(0, duration_s)
    right.set_ylim(bottom=0)
    right.legend(loc="upper right")
    return figure
