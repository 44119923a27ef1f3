"""Colours, markers and layout shared by all figures."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct under every common colour blindness, without its yellow (too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINE_STYLES = ("-", "--", "-.", ":")
DPI = 150


def new_figure(title: str, x_label: str, y_label: str, width: float = 7.0) -> tuple[Figure, Axes]:
    """Returns a figure with a title and a light grid; `width` is in inches."""
    figure = Figure(figsize=(width, 4.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colour_of(index: int) -> str:
    """Returns the colour of the series with this index."""
    return COLOURS[index % len(COLOURS)]
