"""Plots a clip and the attention of a model to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.plots.style import DPI, colour_of, new_figure


def plot_attention_by_layer(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Plots the stacked shares of text, LAL and PLITS in the attention of each layer.

    Args:
        rows: rows of `pal probe`: `layer`, `text`, `lal`, `plits` (0 to 1, sum 1).
    """
    figure, axes = new_figure(title, "layer", "attention of the answer's tokens (%)")
    layers = [row["layer"] for row in rows]
    bottom = np.zeros(len(rows))
    for kind, label, colour in (("lal", "LAL", 0), ("plits", "PLITS", 1), ("text", "text", 6)):
        share = np.array([row[kind] for row in rows])
        axes.bar(
            layers, share, bottom=bottom, color=colour_of(colour), alpha=0.25 if kind == "text" else 1, label=label
        )
        bottom += share
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def plot_attention_by_head(shares: Mapping[str, Sequence[Sequence[float]]], title: str) -> Figure:
    """Plots a heat map of layers and heads for each pathway, all on one scale.

    Args:
        shares: shares[pathway][layer][head], 0 to 1.
    """
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
    """Plots the log-mel spectrogram of a clip over seconds and kHz.

    Args:
        spectrogram: (frames, mel bins) of the whole clip.
        highest_hz: upper edge of the bins, which begin at 0 Hz and are even on HTK's mel scale.
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


def plot_attention_over_time(
    spectrogram: npt.NDArray[np.float32],
    duration_s: float,
    highest_hz: float,
    attention: Mapping[str, npt.NDArray[np.float32]],
    title: str,
) -> Figure:
    """Plots the attention of an answer's tokens to the clip over its spectrogram.

    Args:
        spectrogram, duration_s, highest_hz: see `plot_spectrogram`.
        attention: pathway -> attention to each of its audio tokens, in temporal order, evenly spaced over the clip.
    """
    figure = plot_spectrogram(spectrogram, duration_s, highest_hz, title)
    attention_axes = figure.axes[0].twinx()
    attention_axes.set_ylabel("attention (1 = even over the clip)")
    for index, (name, weights) in enumerate(attention.items()):
        edges = np.linspace(0, duration_s, len(weights) + 1)
        density = weights / max(float(weights.mean()), 1e-12)
        attention_axes.stairs(density, edges, color=colour_of(index), linewidth=2, label=name)
        attention_axes.stairs(density, edges, color=colour_of(index), fill=True, alpha=0.12)
    attention_axes.set_xlim(0, duration_s)
    attention_axes.set_ylim(bottom=0)
    attention_axes.legend(loc="upper right")
    return figure
