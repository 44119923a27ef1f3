"""Figures of runs, scaling experiments and attention. Receives numbers and labels; does not know where they come from.

Every function returns a figure, which `figure.savefig(path)` writes. No global state of matplotlib (pyplot) is used."""

from pipeline.plots.attention import (
    plot_attention_by_head,
    plot_attention_by_layer,
    plot_attention_over_time,
    plot_spectrogram,
)
from pipeline.plots.runs import (
    Curve,
    DomainAccuracy,
    Point,
    plot_accuracy_against,
    plot_accuracy_by_domain,
    plot_loss_curves,
)
from pipeline.plots.scaling import Difference, Line, plot_accuracy_by, plot_cost, plot_differences, plot_law

__all__ = [
    "Curve",
    "Difference",
    "DomainAccuracy",
    "Line",
    "Point",
    "plot_accuracy_against",
    "plot_accuracy_by",
    "plot_accuracy_by_domain",
    "plot_attention_by_head",
    "plot_attention_by_layer",
    "plot_attention_over_time",
    "plot_cost",
    "plot_differences",
    "plot_law",
    "plot_loss_curves",
    "plot_spectrogram",
]
