"""What a scaling experiment says: runs pooled over seeds, accuracy against what varied, Pareto fronts, fitted laws."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.experiments.scaling import fit_power_law, held_out_prediction, pareto_front, pool
from pipeline.experiments.trials import SEED, label_of
from pipeline.tracking.reader import TrainedRun

if TYPE_CHECKING:  # takes seconds to import
    from matplotlib.figure import Figure

NOT_VARIED = ("output", "tracking.", "resolved.", SEED)  # what differs without being a question
COSTS = {"peak_memory_gib": True, "samples_per_s": False}  # metric -> whether less is better
MOST_NAMED = 3  # settings in a label
LOSSES = ("validation/loss", "final_loss")  # the first that all runs have is fitted
LAW_FACTORS = ("parameters", "text_tokens", "audio_layers")
SMALLEST_RANGE = 1.1  # largest over smallest: what varies by less, as tokens do with the seed, tells no exponent


def audio_layers_of(run: TrainedRun) -> list[int]:
    """The layers that any stream of a run enters beside the sequence."""
    return sorted({layer for own in json.loads(run.params.get("resolved.audio_layers", "[]")) for layer in own})


def _parameter(key: str) -> Callable[[TrainedRun], float | None]:
    def read(run: TrainedRun) -> float | None:
        value = run.params.get(key)
        return None if value in (None, "None") else float(value)

    return read


@dataclass(frozen=True)
class Factor:
    """Something that accuracy is drawn against: its value in a run, None where there is none, the keys that set it."""

    label: str
    of: Callable[[TrainedRun], float | None]
    keys: tuple[str, ...]


FACTORS = {
    "audio_layers": Factor(
        "audio layers", lambda run: len(audio_layers_of(run)) or None, ("model.num_audio_layers", "model.audio_layers")
    ),
    "first_audio_layer": Factor(
        "first audio layer",
        lambda run: audio_layers_of(run)[0] if audio_layers_of(run) else None,
        ("model.first_audio_layer", "model.audio_layers"),
    ),
    "layer_stride": Factor("layer stride", _parameter("model.layer_stride"), ("model.layer_stride",)),
    "summary_stride": Factor("summary stride", _parameter("model.summary_stride"), ("model.summary_stride",)),
    "parameters": Factor("parameters", _parameter("resolved.total_parameters"), ("model.language_model",)),
    "text_tokens": Factor("text tokens", lambda run: run.metrics.get("text_tokens"), ("train.steps", "train.tokens")),
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; `settings` are the keys in which groups differ, `usual` their commonest
    values where there are too many keys to name all."""

    settings: Mapping[str, str]
    runs: Sequence[TrainedRun]
    usual: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        told = {key: value for key, value in self.settings.items() if value != self.usual.get(key)}
        if self.settings and not told:
            return "usual settings"
        return label_of(told) or self.runs[0].params.get("model.integration", self.runs[0].label)

    def accuracy(self, benchmark: str) -> tuple[float, float, float] | None:
        """Pooled; None if no run was asked."""
        scores = [run.evaluations[benchmark] for run in self.runs if benchmark in run.evaluations]
        return pool([(s["accuracy"], *s["ci95"]) for s in scores]) if scores else None

    def mean(self, metric: str) -> float | None:
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return statistics.fmean(values) if values else None


def group_runs(runs: Sequence[TrainedRun]) -> list[Group]:
    """Finished runs by their settings, in order of appearance."""
    finished = [run for run in runs if run.status == "FINISHED"]
    keys = sorted({key for run in finished for key in run.params if not key.startswith(NOT_VARIED)})
    varied = [key for key in keys if len({run.params.get(key) for run in finished}) > 1]
    members: dict[tuple[str, ...], list[TrainedRun]] = {}
    for run in finished:
        members.setdefault(tuple(run.params.get(key, "-") for key in varied), []).append(run)
    usual = {}
    if len(varied) > MOST_NAMED:
        usual = {key: statistics.mode(values) for key, values in zip(varied, zip(*members, strict=True), strict=True)}
    return [Group(dict(zip(varied, values, strict=True)), own, usual) for values, own in members.items()]


def pooled_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One row for each group and benchmark, plain JSON; `front_*` tells whether it lies on that Pareto front."""
    rows = []
    for benchmark in sorted({name for group in groups for run in group.runs for name in run.evaluations}):
        own = [(group, pooled) for group in groups if (pooled := group.accuracy(benchmark)) is not None]
        fronts = {}
        for cost, less_is_better in COSTS.items():
            costs = [group.mean(cost) for group, _ in own]
            known = [c for c in costs if c is not None]
            if len(known) == len(costs):
                fronts[cost] = pareto_front(known, [pooled[0] for _, pooled in own], less_is_better=less_is_better)
        for index, (group, (mean, low, high)) in enumerate(own):
            rows.append(
                {
                    "settings": group.label,
                    "benchmark": benchmark,
                    "seeds": len(group.runs),
                    "accuracy": mean,
                    "ci95_low": low,
                    "ci95_high": high,
                    "final_loss": group.mean("final_loss"),
                    **{cost: group.mean(cost) for cost in COSTS},
                    **{f"front_{cost}": front[index] for cost, front in fronts.items()},
                }
            )
    return rows


def trend_figures(experiment: str, groups: Sequence[Group]) -> dict[str, Figure]:
    """For each benchmark and factor with at least two values: accuracy against it, a line for each other setting."""
    from pipeline.plots import Line, plot_accuracy_by

    figures = {}
    for benchmark in sorted({name for group in groups for run in group.runs for name in run.evaluations}):
        for name, factor in FACTORS.items():
            lines: dict[tuple[tuple[str, str], ...], list[tuple[float, float, float, float]]] = {}
            for group in groups:
                x, pooled = factor.of(group.runs[0]), group.accuracy(benchmark)
                if x is not None and pooled is not None:
                    others = tuple((k, v) for k, v in group.settings.items() if k not in factor.keys)
                    lines.setdefault(others, []).append((x, *pooled))
            drawn = {others: sorted(points) for others, points in lines.items() if len({p[0] for p in points}) > 1}
            if drawn:
                labelled = [
                    Line(Group(dict(others), groups[0].runs, groups[0].usual).label, points)
                    for others, points in drawn.items()
                ]
                title = f"Accuracy against {factor.label}: {experiment}, {benchmark}"
                figures[f"trend_{name}_{benchmark}"] = plot_accuracy_by(labelled, factor.label, title)
    return figures


def fit_laws(groups: Sequence[Group]) -> dict[str, Any]:
    """For each integration: loss as a power law of what varied, and its prediction for the largest size, left out."""
    fits: dict[str, Any] = {}
    runs = [run for group in groups for run in group.runs]
    for integration in sorted({run.params.get("model.integration", "-") for run in runs}):
        own = [run for run in runs if run.params.get("model.integration", "-") == integration]
        loss = next((name for name in LOSSES if all(name in run.metrics for run in own)), None)
        found = {name: [float(FACTORS[name].of(run) or 0) for run in own] for name in LAW_FACTORS}
        known = [name for name, each in found.items() if min(each) > 0 and max(each) >= SMALLEST_RANGE * min(each)]
        if loss is None or not known:
            continue
        values = [dict(zip(known, each, strict=True)) for each in zip(*(found[name] for name in known), strict=True)]
        losses = [run.metrics[loss] for run in own]
        law = fit_power_law(values, losses)
        if law is None:
            continue
        fits[integration] = {
            "loss": loss,
            "runs": len(own),
            "constant": law.constant,
            "exponents": {name: list(exponent) for name, exponent in law.exponents.items()},
            "residuals": dict(zip([run.label for run in own], law.residuals, strict=True)),
        }
        if "parameters" in known:
            tested = held_out_prediction(values, losses, "parameters")
            fits[integration]["held_out"] = [
                {"measured": measured, "predicted": predicted, "interval": list(interval),
                 "inside": interval[0] <= measured <= interval[1]}
                for measured, predicted, interval in tested
            ]  # fmt: skip
    return fits


def describe_fits(fits: Mapping[str, Any]) -> list[str]:
    """The laws in words, for the report."""
    lines = []
    for integration, fit in fits.items():
        terms = " x ".join(f"{name}^{value:.3f} ({low:.3f} to {high:.3f})"
                           for name, (value, low, high) in fit["exponents"].items())  # fmt: skip
        worst = max(abs(residual) for residual in fit["residuals"].values())
        lines.append(f"`{integration}`: {fit['loss']} ~ {terms}, {fit['runs']} runs, largest residual {worst:.1%}.")
        tested = fit.get("held_out", [])
        if tested:
            inside = sum(each["inside"] for each in tested)
            low, high = tested[0]["interval"]
            measured = ", ".join(f"{each['measured']:.4f}" for each in tested)
            lines.append(
                f"Fitted without the largest size it predicts {tested[0]['predicted']:.4f} ({low:.4f} to {high:.4f}) "
                f"for that; measured {measured}: {inside} of {len(tested)} inside, so the law "
                f"{'holds' if inside == len(tested) else 'does not hold for every run'} there."
            )
    return lines
