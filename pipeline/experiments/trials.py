"""The config of a sweep, the trials that it defines, and how one trial is run."""

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

from pipeline.config import ExperimentConfig, default_tracking_uri, dump_config, load_config
from pipeline.config.fields import NonNegativeInt, PositiveInt
from pipeline.config.loading import InvalidConfig, shipped_config
from pipeline.config.schema import LENGTHS
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_write
from pipeline.core.records import Strict
from pipeline.launch.subprocesses import CommandFailed, LoggedCommand, run_logged

PARENT = "mlflow.parentRunId"  # tag by which MLflow shows a run under another run
RESULT = "trial.json"  # file in the output folder of a finished trial
SEED = "train.seed"
STEPS = "train.steps"
_KINDS = ("grid", "runs", "questions")  # the keys that may define the trials


def _key(value: Any) -> str:
    """Returns a hashable key that is the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


class BudgetConfig(Strict):
    """Length of training that is the same for all trials; exactly one key is given.

    Attributes:
        steps: optimizer steps.
        tokens: text tokens.
        flops: floating-point operations, counted, not measured.
    """

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    flops: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if sum(value is not None for value in (self.steps, self.tokens, self.flops)) != 1:
            raise InvalidConfig("budget", "needs exactly one of steps, tokens and flops", "give one")
        return self


class QuestionConfig(Strict):
    """A question of a sweep, and the trials that answer it.

    Attributes:
        question: the question in words.
        note: what the answer depends on, for the reader of `pal report --answers`.
        runs: key -> value of each trial; the first is the reference of the others.
    """

    question: str
    note: str = ""
    runs: list[dict[str, Any]] = Field(min_length=2)


class SweepConfig(Strict):
    """One scaling experiment: trials that differ from one config in a few keys.

    Attributes:
        name: name of the MLflow experiment.
        note: what the answers depend on, for the reader of `pal report --answers`.
        experiment: YAML file of the config that the trials start from, or the name of a shipped config.
        output: folder that receives a folder for each trial.
        overrides: key -> value, applied to all trials.
        grid: key -> values; every combination is a trial.
        runs: alternatively a list of trials, each key -> value.
        questions: alternatively questions with their trials, for `pal report --answers`; a trial of several questions
            is run once.
        seeds: random seeds; each trial is run with every seed.
        budget: length of training of all trials; None keeps that of the config.
        evaluate: feature sets on which each trained model is evaluated.
        nproc: ranks of a trial.
        cluster: cluster config for the prediction of memory and time, with nproc GPUs.
        uri: MLflow tracking URI; None means MLFLOW_TRACKING_URI, or an sqlite file in the output folder.
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
        kinds = [name for name in _KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise InvalidConfig("grid", f"needs exactly one of {', '.join(_KINDS)}", "give one")
        lists: dict[str, Sequence[Any]] = {f"grid.{key}": values for key, values in (self.grid or {}).items()}
        lists |= {kinds[0]: getattr(self, kinds[0]), "seeds": self.seeds}
        lists |= {f"questions.{i}.runs": question.runs for i, question in enumerate(self.questions or [])}
        for where, values in lists.items():
            if not values:
                raise InvalidConfig(where, "is empty", "name what the trials differ in")
            if isinstance(values, list) and len({_key(value) for value in values}) < len(values):
                raise InvalidConfig(where, f"repeats a value: {values}", "list each value once")
        for where, keys in (("overrides", self.overrides), *((w, k) for w, k in self._varied())):
            taken = {SEED: "seeds"} | ({STEPS: "budget"} if self.budget else {})
            for key in taken.keys() & keys.keys():
                raise InvalidConfig(f"{where}.{key}", f"is set by {taken[key]}", "leave one out")
        return self

    def _varied(self) -> list[tuple[str, dict[str, Any]]]:
        lists = {"runs": self.runs or []}
        lists |= {f"questions.{i}.runs": question.runs for i, question in enumerate(self.questions or [])}
        return [
            ("grid", self.grid or {}),
            *((f"{name}.{i}", run) for name in lists for i, run in enumerate(lists[name])),
        ]

    def combinations(self) -> list[dict[str, Any]]:
        """Returns what each trial changes, apart from the seed."""
        if self.runs is not None:
            return self.runs
        if self.questions is not None:
            return list({_key(run): run for question in self.questions for run in question.runs}.values())
        grid = self.grid or {}
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    @property
    def tracking_uri(self) -> str:
        """The tracking URI of the trials."""
        return self.uri or default_tracking_uri(self.output / "trial")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        params: values of the keys that the sweep varies, including the seed.
        base: YAML file of the config that the trial starts from.
        overrides: overrides of that config, as command-line arguments.
        config: the resulting config.
    """

    name: str
    params: dict[str, Any]
    base: str
    overrides: tuple[str, ...]
    config: ExperimentConfig

    @property
    def output(self) -> Path:
        """The output folder of the trial."""
        return self.config.output


def make_trial(sweep: SweepConfig, params: dict[str, Any], steps: int | None) -> Trial:
    """Returns the trial of one combination.

    Args:
        params: values of the keys that the sweep varies, including `SEED`.
        steps: length of training; None keeps that of the config.

    Raises:
        UserError: an unknown key, or an invalid value.
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
    """Returns the last parts of the keys with their values, as the name of a folder."""
    parts = (f"{key.rpartition('.')[2]}={short_value(value)}" for key, value in params.items())
    return re.sub(r"[^\w.=,-]+", "-", ",".join(parts))


def label_of(settings: Mapping[str, Any]) -> str:
    """Returns the same for people, such as `num_audio_layers 4`; empty without settings."""
    pairs = [(key.rpartition(".")[2], short_value(value)) for key, value in settings.items()]
    return ", ".join(value if value.startswith(name) else f"{name} {value}" for name, value in pairs)


def is_finished(trial: Trial) -> bool:
    """Returns whether the trial was run before.

    Raises:
        UserError: the folder holds a trial with other settings.
    """
    path = trial.output / RESULT
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["config"] != dump_config(trial.config):
        raise UserError(trial.output, "holds a trial with other settings", "give the sweep another output folder")
    return True


def result_of(trial: Trial) -> dict[str, Any]:
    """Reads the result of a finished trial: `params`, `status`, `run_id` and `metrics`."""
    result: dict[str, Any] = json.loads((trial.output / RESULT).read_text(encoding="utf-8"))
    return {key: result[key] for key in ("params", "status", "run_id", "metrics")}


def run_trial(
    trial: Trial, parent: str | None, evaluate: Sequence[Path], nproc: int, *, ends_with_parent: bool = False
) -> dict[str, Any]:
    """Trains and evaluates a trial; a killed trial resumes from its newest checkpoint.

    Args:
        parent: id of the MLflow run under which the trial is shown.
        evaluate: feature sets.
        nproc: ranks.
        ends_with_parent: as for `run_logged`.

    Returns:
        the result as `result_of`; `status` is FINISHED, or FAILED with an `error`.
    """
    if is_finished(trial):
        return result_of(trial)
    out = trial.output
    tag = [f"tracking.tags={json.dumps({PARENT: parent})}"] if parent else []
    command = ("pipeline.train", trial.base, *trial.overrides, *tag, f"--nproc={nproc}")
    result: dict[str, Any] = {"params": trial.params, "run_id": None, "metrics": {}}
    try:
        run = partial(run_logged, ends_with_parent=ends_with_parent)
        results, _ = run(LoggedCommand("training", command, out / "train.log", out / "train.figures.json"))
        result |= {"run_id": results["run_id"], "metrics": {k: v for k, v in results.items() if isinstance(v, float)}}
        if evaluate:
            evaluation = ("pipeline.evaluate", str(out / "model"), *map(str, evaluate))
            scores, _ = run(
                LoggedCommand("evaluation", evaluation, out / "evaluate.log", out / "evaluate.figures.json")
            )
            for benchmark, score in scores.items():
                result["metrics"] |= {f"eval/{benchmark}/{key}": score[key] for key in ("accuracy", "ci95")}
    except CommandFailed as failure:
        return {**result, "status": "FAILED", "error": str(failure).splitlines()[0]}
    result["status"] = "FINISHED"
    atomic_write(out / RESULT, json.dumps({**result, "config": dump_config(trial.config)}, indent=2).encode())
    return result


def short_value(value: object) -> str:
    """Returns a setting's value as a label: the last part of a path, a fraction unchanged."""
    text = str(value)
    return text if re.fullmatch(r"\d+/\d+", text) else text.rpartition("/")[2]
