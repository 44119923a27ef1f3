"""The trends of a scaling experiment: runs pooled over seeds, accuracy against settings, Pareto fronts, fitted laws."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.intervals import Estimate, pool_seeds
from pipeline.experiments.scaling import fit_power_law, held_out_prediction, pareto_front
from pipeline.experiments.trials import SEED, label_of
from pipeline.tracking.reader import TrainedRun

if TYPE_CHECKING:  # takes seconds to import
    from matplotlib.figure import Figure

NOT_VARIED = ("output", "tracking.", "resolved.", SEED)  # parameters that differ without being settings
COSTS = {"peak_memory_gib": True, "samples_per_s": False}  # metric -> whether less is better
MAX_LABEL_SETTINGS = 3  # with more, a label names only the settings that are unusual
LOSSES = ("validation/loss", "final_loss")  # the first that all runs have is fitted
LAW_FACTORS = ("parameters", "text_tokens", "audio_layers")
MIN_RANGE = 1.1  # largest over smallest value of a factor; tokens vary by less with the seed alone


def audio_layers_of(run: TrainedRun) -> list[int]:
    """Returns the audio layers of a run, over all its streams; empty if audio is in the sequence alone."""
    return sorted({layer for stream in json.loads(run.params.get("resolved.audio_layers", "[]")) for layer in stream})


def _parameter(key: str) -> Callable[[TrainedRun], float | None]:
    def read(run: TrainedRun) -> float | None:
        value = run.params.get(key)
        return None if value in (None, "None") else float(value)

    return read


@dataclass(frozen=True)
class Factor:
    """A quantity against which accuracy is drawn.

    Attributes:
        value: returns its value in a run; None if the run has none.
        keys: config keys that set it.
    """

    label: str
    value: Callable[[TrainedRun], float | None]
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
    """Runs that differ only in their seed.

    Attributes:
        settings: values of the keys in which groups differ.
        usual: most frequent values of these keys, if they are too many to be named in a label.
    """

    settings: Mapping[str, str]
    runs: Sequence[TrainedRun]
    usual: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Names the settings, or those that are unusual."""
        named = {key: value for key, value in self.settings.items() if value != self.usual.get(key)}
        if self.settings and not named:
            return "usual settings"
        return label_of(named) or self.runs[0].params.get("model.integration", self.runs[0].label)

    def accuracy(self, benchmark: str) -> Estimate | None:
        """Returns the accuracy over all seeds; None if no run has scores on the benchmark."""
        scores = [run.scored[benchmark] for run in self.runs if benchmark in run.scored]
        return pool_seeds([(s["accuracy"], *s["ci95"]) for s in scores]) if scores else None

    def mean(self, metric: str) -> float | None:
        """Returns the mean of a metric over the runs that have it."""
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return statistics.fmean(values) if values else None


def group_runs(runs: Sequence[TrainedRun]) -> list[Group]:
    """Groups finished runs by their settings, in order of appearance."""
    finished = [run for run in runs if run.status == "FINISHED"]
    keys = sorted({key for run in finished for key in run.params if not key.startswith(NOT_VARIED)})
    varied = [key for key in keys if len({run.params.get(key) for run in finished}) > 1]
    members: dict[tuple[str, ...], list[TrainedRun]] = {}
    for run in finished:
        members.setdefault(tuple(run.params.get(key, "-") for key in varied), []).append(run)
    usual = {}
    if len(varied) > MAX_LABEL_SETTINGS:
        usual = {key: statistics.mode(values) for key, values in zip(varied, zip(*members, strict=True), strict=True)}
    return [Group(dict(zip(varied, values, strict=True)), group, usual) for values, group in members.items()]


def pooled_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns one row per group and benchmark as plain JSON; `front_*` is whether it is on that Pareto front."""
    rows = []
    for benchmark in sorted({name for group in groups for run in group.runs for name in run.scored}):
        evaluated = [(group, pooled) for group in groups if (pooled := group.accuracy(benchmark)) is not None]
        fronts = {}
        for cost, less_is_better in COSTS.items():
            costs = [group.mean(cost) for group, _ in evaluated]
            known = [c for c in costs if c is not None]
            if len(known) == len(costs):
                fronts[cost] = pareto_front(
                    known, [pooled.value for _, pooled in evaluated], less_is_better=less_is_better
                )
        for index, (group, (mean, low, high)) in enumerate(evaluated):
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
    """Draws accuracy against each factor with at least two values, for each benchmark; one line per other setting."""
    from pipeline.plots import Line, plot_accuracy_by

    figures = {}
    for benchmark in sorted({name for group in groups for run in group.runs for name in run.scored}):
        for name, factor in FACTORS.items():
            lines: dict[tuple[tuple[str, str], ...], list[tuple[float, float, float, float]]] = {}
            for group in groups:
                x, pooled = factor.value(group.runs[0]), group.accuracy(benchmark)
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
    """Fits loss as a power law of the varied factors, by integration; predicts the largest size from the others."""
    fits: dict[str, Any] = {}
    runs = [run for group in groups for run in group.runs]
    for integration in sorted({run.params.get("model.integration", "-") for run in runs}):
        members = [run for run in runs if run.params.get("model.integration", "-") == integration]
        loss = next((name for name in LOSSES if all(name in run.metrics for run in members)), None)
        factors = {name: [float(FACTORS[name].value(run) or 0) for run in members] for name in LAW_FACTORS}
        varied = [name for name, each in factors.items() if min(each) > 0 and max(each) >= MIN_RANGE * min(each)]
        if loss is None or not varied:
            continue
        values = [
            dict(zip(varied, each, strict=True)) for each in zip(*(factors[name] for name in varied), strict=True)
        ]
        losses = [run.metrics[loss] for run in members]
        law = fit_power_law(values, losses)
        if law is None:
            continue
        fits[integration] = {
            "loss": loss,
            "runs": len(members),
            "constant": law.constant,
            "exponents": {name: list(exponent) for name, exponent in law.exponents.items()},
            "residuals": dict(zip([run.label for run in members], law.residuals, strict=True)),
        }
        if "parameters" in varied:
            predictions = held_out_prediction(values, losses, "parameters")
            fits[integration]["held_out"] = [
                {"measured": measured, "predicted": predicted, "interval": list(interval),
                 "inside": interval[0] <= measured <= interval[1]}
                for measured, predicted, interval in predictions
            ]  # fmt: skip
    return fits


def describe_fits(fits: Mapping[str, Any]) -> list[str]:
    """Describes the laws in words, for the report."""
    lines = []
    for integration, fit in fits.items():
        terms = " x ".join(f"{name}^{value:.3f} ({low:.3f} to {high:.3f})"
                           for name, (value, low, high) in fit["exponents"].items())  # fmt: skip
        worst = max(abs(residual) for residual in fit["residuals"].values())
        lines.append(f"`{integration}`: {fit['loss']} ~ {terms}, {fit['runs']} runs, largest residual {worst:.1%}.")
        held_out = fit.get("held_out", [])
        if held_out:
            inside = sum(each["inside"] for each in held_out)
            low, high = held_out[0]["interval"]
            measured = ", ".join(f"{each['measured']:.4f}" for each in held_out)
            lines.append(
                f"Fitted without the largest size, the law predicts {held_out[0]['predicted']:.4f} "
                f"({low:.4f} to {high:.4f}) for it; measured {measured}: {inside} of {len(held_out)} inside the "
                f"interval, so the law {'holds' if inside == len(held_out) else 'does not hold for every run'} there."
            )
    return lines
