"""Stages of a curriculum as plain experiments, each of which starts from the one before."""

from __future__ import annotations

from pipeline.config.loading import merge, validate_config
from pipeline.config.schema import LENGTHS, ExperimentConfig, default_tracking_uri
from pipeline.core.errors import UserError, nearest


def resolve_stages(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """Stage name -> its experiment in `<output>/<NN>-<name>`, in order. Without stages the experiment itself, as "".

    A stage that says how long it takes (steps, epochs or tokens) replaces what `train` says.

    Raises:
        UserError: a stage changes what does not exist, or is not a whole experiment.
    """
    if not config.stages:
        return {"": config}
    common = config.model_dump(mode="json", exclude={"stages"})
    common["tracking"]["uri"] = config.tracking.uri or default_tracking_uri(config.output)
    name_of_run = config.tracking.run_name or config.output.name
    resolved: dict[str, ExperimentConfig] = {}
    before = config.starts_from
    for number, (name, stage) in enumerate(config.stages.items(), start=1):
        output = config.output / f"{number:02d}-{name}"
        tags = {"pal.curriculum": name_of_run, "pal.stage": name}
        values = merge(common, {"tracking": {"run_name": f"{name_of_run}/{name}", "tags": tags}})
        if stage.train.keys() & set(LENGTHS):
            values = merge(values, {"train": dict.fromkeys(LENGTHS)})
        values = merge(values, stage.model_dump())
        values |= {"output": output, "starts_from": before}
        resolved[name] = validate_config(ExperimentConfig, values, f"stages.{name}")
        before = output
    return resolved


def choose_stages(config: ExperimentConfig, name: str | None) -> dict[str, ExperimentConfig]:
    """All stages, or the one of that name.

    Raises:
        UserError: there is none of that name; see `resolve_stages`.
    """
    stages = resolve_stages(config)
    if name is None:
        return stages
    if not config.stages:
        raise UserError("--stage", "the config has no stages", "leave it out")
    if name not in stages:
        raise UserError("--stage", f"there is no stage '{name}'", nearest(name, stages))
    return {name: stages[name]}
