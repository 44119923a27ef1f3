"""Figures have the expected labels, and no label covers another label or a point."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from pipeline.plots import (
    Curve,
    DomainAccuracy,
    Point,
    plot_accuracy_against,
    plot_accuracy_by_domain,
    plot_loss_curves,
)

NAMES = ("plits", "lal", "pal_v3")


def boxes_of_labels(figure: Figure) -> list[Bbox]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [Text.get_window_extent(label, canvas.get_renderer()) for label in figure.axes[0].texts]


def legend_of(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_loss_curves_show_every_run_and_its_mean(tmp_path: Path) -> None:
    losses = np.linspace(4, 0.1, 100)
    figure = plot_loss_curves([Curve(name, range(1, 101), losses) for name in NAMES], "Loss of demo")
    axes = figure.axes[0]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_yscale()) == ("Loss of demo", "optimizer step", "log")
    assert "nats per answer token" in axes.get_ylabel()
    assert legend_of(figure) == list(NAMES)
    raw, mean = axes.lines[:2]
    assert np.allclose(raw.get_ydata(), losses)
    assert np.allclose(np.asarray(mean.get_ydata())[10], losses[7:11].mean())  # 4 % of 100 points
    (point,) = plot_loss_curves([Curve("stopped", [1], [4.0])], "Loss of demo").axes[0].lines[1:]
    assert point.get_marker() == "o", "a line through one point is invisible"
    figure.savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("xs", "accuracies"),
    [
        ((1.4, 0.8, 0.9), (0.93, 0.94, 0.945)),
        ((1.0, 1.0, 1.0), (0.9, 0.9, 0.9)),  # the very same point
        (np.linspace(0.9, 1, 8), np.full(8, 0.5)),
        ((0.0, 0.0), (1.0, 0.0)),
    ],
)
def test_point_labels_cover_neither_each_other_nor_leave_the_frame(xs: list[float], accuracies: list[float]) -> None:
    points = [
        Point(f"variant-{i}", x, a, a - 0.02, a + 0.02) for i, (x, a) in enumerate(zip(xs, accuracies, strict=True))
    ]
    figure = plot_accuracy_against(points, "peak memory (GiB)", "Accuracy against memory")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.texts] == [point.label for point in points]
    assert axes.get_xlabel() == "peak memory (GiB)"
    boxes = boxes_of_labels(figure)
    assert all(0 <= tick <= 1 for tick in axes.get_yticks()), "no tick is outside 0 to 100 %"
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    markers = axes.transData.transform([(point.x, point.accuracy) for point in points])
    assert not any(box.contains(x, y) for box in boxes for x, y in markers)


def test_many_points_are_named_in_a_legend() -> None:
    points = [Point(f"variant-{i}", 1.0, 0.5, 0.4, 0.6) for i in range(21)]
    figure = plot_accuracy_against(points, "peak memory (GiB)", "Accuracy against memory")
    assert legend_of(figure) == [point.label for point in points] and not figure.axes[0].texts
    styles = {(line.get_marker(), line.get_color()) for line in figure.axes[0].lines if len(line.get_xdata()) == 1}
    assert len(styles - {("_", colour) for _, colour in styles}) == 21, "every point has its own style"


def test_bars_show_control_and_baseline_for_every_domain(tmp_path: Path) -> None:
    accuracy = dict.fromkeys(("sound", "music", "speech"), (0.9, 0.85, 0.93))
    swapped = dict.fromkeys(("sound", "music", "speech"), (0.3, 0.2, 0.35))
    figure = plot_accuracy_by_domain(
        [DomainAccuracy(name, accuracy, swapped) for name in NAMES], dict.fromkeys(accuracy, 0.33), "Accuracy by domain"
    )
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["music", "sound", "speech"]
    assert set(legend_of(figure)) == {*NAMES, *(f"{name}, swapped audio" for name in NAMES), "majority baseline"}
    assert sorted(bar.get_height() for bar in axes.patches) == [0.3] * 9 + [0.9] * 9
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(left[1] <= right[0] + 1e-9 for left, right in itertools.pairwise(spans))
    figure.savefig(tmp_path / "domains.png")
    assert (tmp_path / "domains.png").stat().st_size > 10_000
