"""Runs the trials of a sweep on a Ray cluster: each in a placement group, as a DeepSpeed job of its own.

Needs a file system that all nodes share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.core.errors import UserError
from pipeline.experiments.trials import Trial, run_trial
from pipeline.launch.ray_launcher import ray_driver

MAX_RETRIES = 5  # for a trial whose node is lost; it resumes from its newest checkpoint


def run_on_cluster(
    address: str,
    trials: Sequence[Trial],
    parent: str | None,
    evaluate: Sequence[Path],
    nproc: int,
    on_result: Callable[[str, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Runs as many trials at once as fit on the cluster, and returns their results in the order of `trials`.

    Args:
        parent, evaluate, nproc: as for `run_trial`.
        on_result: receives name and result of each trial when it ends.

    Raises:
        UserError: no cluster at this address, or no node that is large enough for a trial.
    """
    with ray_driver(address):
        kinds = ("GPU", "CPU") if ray.cluster_resources().get("GPU") else ("CPU",)
        bundle = dict.fromkeys(kinds, float(nproc))
        if not any(all(node["Resources"].get(k, 0) >= nproc for k in kinds) for node in ray.nodes() if node["Alive"]):
            raise UserError("nproc", f"no node of the cluster has {nproc} {kinds[0]}s", "lower nproc")
        remote = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_retries=MAX_RETRIES)(_run)
        groups = [placement_group([bundle]) for _ in trials]
        waiting = {
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote(
                str(Path.cwd()), trial, parent, list(evaluate), nproc
            ): number
            for number, (group, trial) in enumerate(zip(groups, trials, strict=True))
        }
        results: dict[int, dict[str, Any]] = {}
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            number = waiting.pop(done)
            results[number] = _result(done, trials[number])
            remove_placement_group(groups[number])
            on_result(trials[number].name, results[number])
    return [results[number] for number in range(len(trials))]


def _run(folder: str, trial: Trial, parent: str | None, evaluate: list[Path], nproc: int) -> dict[str, Any]:
    os.chdir(folder)  # relative paths in configs start from the folder where the sweep was started
    return run_trial(trial, parent, evaluate, nproc, ends_with_parent=True)


def _result(done: Any, trial: Trial) -> dict[str, Any]:
    try:
        result: dict[str, Any] = ray.get(done)
    except ray.exceptions.RayError as error:
        lost = {"params": trial.params, "run_id": None, "metrics": {}, "status": "FAILED"}
        return {**lost, "error": str(error).splitlines()[0]}
    return result
