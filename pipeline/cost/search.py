"""The cheapest way to run a config on a cluster, and why not the others."""

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
    """Every shipped ZeRO policy, with and without checkpointing, at every micro-batch of a power of two that divides.

    Args:
        policies: only these; None means all that need no folder of their own.
    """
    if policies is None:
        policies = sorted(p.stem for p in POLICIES.glob("*.json") if "nvme" not in p.stem)
    per_rank, rest = divmod(config.train.global_batch_size, config.data.questions_per_sequence * cluster.gpus)
    sizes = [2**n for n in range(per_rank.bit_length()) if per_rank % 2**n == 0]
    if rest or not sizes:
        config.gradient_accumulation_steps(cluster.gpus)  # tells the user why
    found = []
    for policy in policies:
        for checkpointing in (False, True):
            for micro in sizes:
                changes: dict[str, Any] = {"zero": policy, "gradient_checkpointing": checkpointing}
                changes |= {"micro_batch_size": micro, "micro_batch_tokens": None}
                train = config.train.model_copy(update=changes)
                found.append(predict(config.model_copy(update={"train": train}), cluster, workload))
    return found


def cheapest(predictions: Sequence[Prediction]) -> Prediction | None:
    """The fastest that fits (all cost the same per hour); of equals the one that recomputes less and needs less."""
    fitting = [p for p in predictions if not p.does_not_fit]
    return min(fitting, key=lambda p: (p.step_s, p.gradient_checkpointing, p.memory_gib["total"]), default=None)


def verdicts(predictions: Sequence[Prediction]) -> list[str]:
    """One line for each policy, with and without checkpointing: why it is not the cheapest."""
    best, lines = cheapest(predictions), []
    for zero_name, checkpointing in dict.fromkeys((p.zero, p.gradient_checkpointing) for p in predictions):
        own = [p for p in predictions if (p.zero, p.gradient_checkpointing) == (zero_name, checkpointing)]
        name = f"{zero_name}{' with checkpointing' if checkpointing else ''}"
        own_best = cheapest(own)
        if own_best is None:
            smallest = min(own, key=lambda p: p.micro_batch_size)
            lines.append(f"{name}: micro-batch {smallest.micro_batch_size} {smallest.does_not_fit}")
        elif own_best is best:
            lines.append(f"{name}: the cheapest, micro-batch {own_best.micro_batch_size}")
        elif best is not None:
            slower = own_best.step_s / best.step_s - 1
            lines.append(f"{name}: fits with micro-batch {own_best.micro_batch_size}, {slower:.1%} slower")
    return lines
