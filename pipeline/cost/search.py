"""Finds the cheapest way to run a config on a cluster, and says why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.cost.predict import Prediction, predict
from pipeline.engine import POLICIES


def search(
    config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig, policies: Sequence[str] | None = None
) -> list[Prediction]:
    """Predicts every ZeRO policy, with and without checkpointing, at every power-of-two micro-batch that divides.

    Args:
        policies: names of the policies to try; None means every shipped one that needs no folder of its own.

    Raises:
        UserError: the global batch does not divide over the cluster.
    """
    if policies is None:
        policies = sorted(p.stem for p in POLICIES.glob("*.json") if "nvme" not in p.stem)
    rows = config.rows_per_rank(cluster.gpus)
    micro_batch_sizes = [2**n for n in range(rows.bit_length()) if rows % 2**n == 0]
    predictions = []
    for policy in policies:
        for checkpointing in (False, True):
            for micro_batch_size in micro_batch_sizes:
                changes: dict[str, Any] = {"zero": policy, "gradient_checkpointing": checkpointing}
                changes |= {"micro_batch_size": micro_batch_size, "micro_batch_tokens": None}
                train = config.train.model_copy(update=changes)
                predictions.append(predict(config.model_copy(update={"train": train}), cluster, workload))
    return predictions


def cheapest(predictions: Sequence[Prediction]) -> Prediction | None:
    """Returns the fastest that fits (an hour costs the same for all), or None if none fits.

    Of equally fast ones it is the one that recomputes less, then the one that needs less memory.
    """
    fitting = [p for p in predictions if not p.does_not_fit]
    return min(fitting, key=lambda p: (p.step_s, p.gradient_checkpointing, p.memory_gib["total"]), default=None)


def explain_alternatives(predictions: Sequence[Prediction]) -> list[str]:
    """Returns one line for each policy, with and without checkpointing, that says why it is not the cheapest."""
    best, lines = cheapest(predictions), []
    for zero_name, checkpointing in dict.fromkeys((p.zero, p.gradient_checkpointing) for p in predictions):
        candidates = [p for p in predictions if (p.zero, p.gradient_checkpointing) == (zero_name, checkpointing)]
        name = f"{zero_name}{' with checkpointing' if checkpointing else ''}"
        best_candidate = cheapest(candidates)
        if best_candidate is None:
            smallest = min(candidates, key=lambda p: p.micro_batch_size)
            lines.append(f"{name}: micro-batch {smallest.micro_batch_size} {smallest.does_not_fit}")
        elif best_candidate is best:
            lines.append(f"{name}: the cheapest, micro-batch {best_candidate.micro_batch_size}")
        elif best is not None:
            slower = best_candidate.step_s / best.step_s - 1
            lines.append(f"{name}: fits with micro-batch {best_candidate.micro_batch_size}, {slower:.1%} slower")
    return lines
