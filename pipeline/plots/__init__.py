"""The pictures. The one door to matplotlib; knows numbers and labels, not where they come from.

Every function returns a figure; `figure.savefig(path)` writes it. Nothing global (pyplot) is touched."""

from pipeline.plots.attention import plot_attention_by_head, plot_attention_by_layer, plot_listening, plot_spectrogram
from pipeline.plots.runs import (
    Bars,
    Curve,
    Point,
    plot_accuracy_against,
    plot_accuracy_by_domain,
    plot_loss_curves,
)
from pipeline.plots.scaling import Difference, Line, plot_accuracy_by, plot_cost, plot_differences, plot_law

__all__ = [
    "Bars",
    "Curve",
    "Difference",
    "Line",
    "Point",
    "plot_accuracy_against",
    "plot_accuracy_by",
    "plot_accuracy_by_domain",
    "plot_attention_by_head",
    "plot_attention_by_layer",
    "plot_cost",
    "plot_differences",
    "plot_law",
    "plot_listening",
    "plot_loss_curves",
    "plot_spectrogram",
]
