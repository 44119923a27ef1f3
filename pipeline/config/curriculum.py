"""Resolves the stages of a curriculum to plain experiments, each of which starts from the previous one."""

from __future__ import annotations

from pipeline.config.loading import merge, validate_config
from pipeline.config.schema import LENGTHS, ExperimentConfig, default_tracking_uri
from pipeline.core.errors import UserError, nearest


def resolve_stages(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """Returns stage name -> experiment in `<output>/<NN>-<name>`, in order; without stages, "" -> the experiment.

    A stage that sets its length (steps, epochs or tokens) replaces the length in `train`.

    Raises:
        UserError: a stage changes a setting that does not exist, or does not form a complete experiment.
    """
    if not config.stages:
        return {"": config}
    common = config.model_dump(mode="json", exclude={"stages"})
    common["tracking"]["uri"] = config.tracking.uri or default_tracking_uri(config.output)
    run_name = config.tracking.run_name or config.output.name
    resolved: dict[str, ExperimentConfig] = {}
    previous = config.starts_from
    for number, (name, stage) in enumerate(config.stages.items(), start=1):
        output = config.output / f"{number:02d}-{name}"
        tags = {"pal.curriculum": run_name, "pal.stage": name}
        values = merge(common, {"tracking": {"run_name": f"{run_name}/{name}", "tags": tags}})
        if stage.train.keys() & set(LENGTHS):
            values = merge(values, {"train": dict.fromkeys(LENGTHS)})
        values = merge(values, stage.model_dump())
        values |= {"output": output, "starts_from": previous}
        resolved[name] = validate_config(ExperimentConfig, values, f"stages.{name}")
        previous = output
    return resolved


def choose_stages(config: ExperimentConfig, name: str | None) -> dict[str, ExperimentConfig]:
    """Returns all stages, or the one with this name.

    Raises:
        UserError: no stage has this name; see also `resolve_stages`.
    """
    stages = resolve_stages(config)
    if name is None:
        return stages
    if not config.stages:
        raise UserError("--stage", "the config has no stages", "remove the option")
    if name not in stages:
        raise UserError("--stage", f"there is no stage '{name}'", nearest(name, stages))
    return {name: stages[name]}
