"""The trials of a sweep: what a sweep file says, the experiments that it means, and how one is run, once."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config import ExperimentConfig, Strict, dump_config, load_config
from pipeline.config.fields import NonNegativeInt, PositiveInt
from pipeline.config.loading import InvalidConfig, shipped_config
from pipeline.config.schema import LENGTHS
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write
from pipeline.launch.subprocesses import CommandFailed, LoggedCommand, run_logged

PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows runs under another
RESULT = "trial.json"  # of a finished trial, in its output folder
SEED = "train.seed"
STEPS = "train.steps"
_KINDS = ("grid", "runs", "questions")  # the ways to say what trials differ in


def _key(value: Any) -> str:
    """Equal for equal values, also those that Python cannot hash."""
    return json.dumps(value, sort_keys=True, default=str)


class BudgetConfig(Strict):
    """What all trials get alike; give one. Tokens are those of text; operations are counted, not measured."""

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    flops: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if sum(value is not None for value in (self.steps, self.tokens, self.flops)) != 1:
            raise InvalidConfig("budget", "needs exactly one of steps, tokens and flops", "give one")
        return self


class QuestionConfig(Strict):
    """What a sweep asks, and the trials that answer it.

    Attributes:
        question: in words; `note` says what the answer depends on.
        runs: key -> value of each trial; the others are held against the first.
    """

    question: str
    note: str = ""
    runs: list[dict[str, Any]] = Field(min_length=2)


class SweepConfig(Strict):
    """One scaling experiment: trials that differ from one config in a few keys.

    Attributes:
        name: of the MLflow experiment.
        note: what its answers depend on, for the reader of `pal report --answers`.
        experiment: the config's YAML file, or the name of a shipped one.
        output: receives a folder for each trial.
        overrides: keys of it that all trials change.
        grid: key -> values; every combination is a trial.
        runs: or a list of trials, each key -> value.
        questions: or questions with their trials, for `pal report --answers`; what several ask for is run once.
        seeds: each trial is run with each.
        budget: None leaves the config's length of training.
        evaluate: feature sets that each model answers.
        nproc: ranks of a trial.
        cluster: what memory and time are predicted for; its number of GPUs is taken to be nproc.
        uri: MLflow tracking URI; None means an sqlite file in the output folder.
    """

    name: str
    note: str = ""
    experiment: str
    output: Path
    overrides: dict[str, Any] = {}
    grid: dict[str, list[Any]] | None = None
    runs: list[dict[str, Any]] | None = None
    questions: list[QuestionConfig] | None = None
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    budget: BudgetConfig | None = None
    evaluate: list[Path] = []
    nproc: PositiveInt = 1
    cluster: str = "a100_80"
    uri: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidConfig("grid", f"needs exactly one of {', '.join(_KINDS)}", "give one")
        lists: dict[str, Sequence[Any]] = {f"grid.{key}": values for key, values in (self.grid or {}).items()}
        lists |= {given[0]: getattr(self, given[0]), "seeds": self.seeds}
        lists |= {f"questions.{i}.runs": asked.runs for i, asked in enumerate(self.questions or [])}
        for where, values in lists.items():
            if not values:
                raise InvalidConfig(where, "is empty", "say what the trials differ in")
            if isinstance(values, list) and len({_key(value) for value in values}) < len(values):
                raise InvalidConfig(where, f"repeats a value: {values}", "list each value once")
        for where, keys in (("overrides", self.overrides), *((w, k) for w, k in self._varied())):
            taken = {SEED: "seeds"} | ({STEPS: "budget"} if self.budget else {})
            for key in taken.keys() & keys.keys():
                raise InvalidConfig(f"{where}.{key}", f"is set by {taken[key]}", "leave one out")
        return self

    def _varied(self) -> list[tuple[str, dict[str, Any]]]:
        lists = {"runs": self.runs or []}
        lists |= {f"questions.{i}.runs": asked.runs for i, asked in enumerate(self.questions or [])}
        return [
            ("grid", self.grid or {}),
            *((f"{name}.{i}", run) for name in lists for i, run in enumerate(lists[name])),
        ]

    def combinations(self) -> list[dict[str, Any]]:
        """What each trial changes, without its seed."""
        if self.runs is not None:
            return self.runs
        if self.questions is not None:
            return list({_key(run): run for asked in self.questions for run in asked.runs}.values())
        grid = self.grid or {}
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    @property
    def tracking_uri(self) -> str:
        return self.uri or f"sqlite:///{self.output.absolute() / 'mlflow.db'}"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; `params` are the keys that the sweep varies, the seed included."""

    name: str
    params: dict[str, Any]
    base: str
    overrides: tuple[str, ...]
    config: ExperimentConfig

    @property
    def output(self) -> Path:
        return self.config.output


def make_trial(sweep: SweepConfig, params: dict[str, Any], steps: int | None) -> Trial:
    """The experiment of one combination.

    Args:
        params: what the sweep varies, `SEED` included.
        steps: that it trains; None leaves what the config says.

    Raises:
        UserError: a key that no experiment has, or a value that it does not take.
    """
    name = trial_name(params)
    values = {
        **sweep.overrides,
        **params,
        **({} if steps is None else dict.fromkeys(f"train.{name}" for name in LENGTHS) | {STEPS: steps}),
        "output": str(sweep.output.absolute() / name),
        "tracking.uri": sweep.tracking_uri,
        "tracking.experiment": sweep.name,
        "tracking.run_name": name,
    }
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
    base = str(shipped_config(sweep.experiment).absolute())
    return Trial(name, params, base, overrides, load_config(ExperimentConfig, base, overrides))


def trial_name(params: dict[str, Any]) -> str:
    """Keys without their path, and values, as the name of a folder."""
    parts = (f"{key.rpartition('.')[2]}={short_value(value)}" for key, value in params.items())
    return re.sub(r"[^\w.=,-]+", "-", ",".join(parts))


def label_of(settings: Mapping[str, Any]) -> str:
    """The same, in words; empty for none."""
    pairs = [(key.rpartition(".")[2], short_value(value)) for key, value in settings.items()]
    return ", ".join(value if value.startswith(name) else f"{name} {value}" for name, value in pairs)


def is_finished(trial: Trial) -> bool:
    """Whether it was run before.

    Raises:
        UserError: its folder holds a trial with other settings.
    """
    path = trial.output / RESULT
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["config"] != dump_config(trial.config):
        raise UserError(trial.output, "holds a trial with other settings", "give the sweep another output")
    return True


def result_of(trial: Trial) -> dict[str, Any]:
    """What a finished trial left: `params`, `status`, `run_id` and `metrics`."""
    result: dict[str, Any] = json.loads((trial.output / RESULT).read_text(encoding="utf-8"))
    return {key: result[key] for key in ("params", "status", "run_id", "metrics")}


def run_trial(
    trial: Trial, parent: str | None, evaluate: Sequence[Path], nproc: int, *, ends_with_parent: bool = False
) -> dict[str, Any]:
    """Trains and evaluates; one that was killed goes on from its newest checkpoint.

    Args:
        parent: MLflow run that this one belongs to.
        ends_with_parent: see `run_logged`.

    Returns:
        see `result_of`; `status` is FINISHED, or FAILED with `error`.
    """
    if is_finished(trial):
        return result_of(trial)
    out = trial.output
    tag = [f"tracking.tags={json.dumps({PARENT: parent})}"] if parent else []
    command = ("pipeline.train", trial.base, *trial.overrides, *tag, f"--nproc={nproc}")
    result: dict[str, Any] = {"params": trial.params, "run_id": None, "metrics": {}}
    try:
        run = partial(run_logged, ends_with_parent=ends_with_parent)
        figures, _ = run(LoggedCommand("training", command, out / "train.log", out / "train.figures.json"))
        result |= {"run_id": figures["run_id"], "metrics": {k: v for k, v in figures.items() if isinstance(v, float)}}
        if evaluate:
            asked = ("pipeline.evaluate", str(out / "model"), *map(str, evaluate))
            scores, _ = run(
                LoggedCommand("evaluation", asked, out / "evaluate.log", out / "evaluate.figures.json")
            )
            for benchmark, score in scores.items():
                result["metrics"] |= {f"eval/{benchmark}/{key}": score[key] for key in ("accuracy", "ci95")}
    except CommandFailed as failure:
        return {**result, "status": "FAILED", "error": str(failure).splitlines()[0]}
    result["status"] = "FINISHED"
    atomic_write(out / RESULT, json.dumps({**result, "config": dump_config(trial.config)}, indent=2).encode())
    return result


def short_value(value: object) -> str:
    """A setting's value as a label: of a path its last part, a fraction as it is."""
    text = str(value)
    return text if re.fullmatch(r"\d+/\d+", text) else text.rpartition("/")[2]
