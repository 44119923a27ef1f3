"""The tables of `pal plan --table`: one epoch of OpenAQA, by model, cluster and integration."""

from __future__ import annotations

from typing import Any

from pipeline.config import ExperimentConfig, load_config, validate_config
from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.cost.search import cheapest, search
from pipeline.cost.workload import total_steps

OPENAQA = "openaqa_workload"
ENCODER = "sslam"
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")
CLUSTERS = ("a100_80", "h100_80")
GPUS = (8, 64, 256, 1024)
BATCH = 6144  # questions: divides over 1,024 GPUs, packed by six as well
PACKED = 6
VARIANTS = (("plits", 1), ("lal", 1), ("lal", PACKED), ("pal_v3", 1))  # integration, questions per sequence
POLICIES = ("zero1", "zero2", "zero3", "zero3_offload")


def epoch_by_integration(cluster: ClusterConfig, workload: WorkloadConfig) -> list[dict[str, Any]]:
    """Returns one row for each integration of the smallest model: its time by operations alone, and by the whole model.

    Args:
        cluster: machines that hold the smallest model at least under one policy.
    """
    rows = []
    for integration, packed in VARIANTS:
        config = _epoch_config(MODELS[0], integration, packed)
        best = cheapest(search(config, cluster, workload, POLICIES))
        assert best is not None  # one billion parameters fit into 80 GiB
        hours = total_steps(config, workload) * best.step_s / 3600
        rows.append(
            {
                "integration": _variant_name(integration, packed),
                "h by FLOPs alone": hours * best.mfu / cluster.efficiency,
                "h": hours,
                "zero": best.zero,
                "micro-batch": best.micro_batch_size,
                **{f"{part} s": value for part, value in best.seconds.items()},
                "step s": best.step_s,
                "mfu": best.mfu,
                "cost": hours * cluster.gpus * cluster.price_per_gpu_hour,
            }
        )
    return rows


def epoch_by_cluster(workload: WorkloadConfig) -> list[dict[str, Any]]:
    """Returns one row for each model, integration and cluster, run in the cheapest way that fits."""
    return [
        _cheapest_row(model, variant, load_config(ClusterConfig, name, [f"nodes={gpus // 8}"]), workload)
        for model in MODELS
        for variant in VARIANTS
        for name in CLUSTERS
        for gpus in GPUS
    ]


def _cheapest_row(
    model: str, variant: tuple[str, int], cluster: ClusterConfig, workload: WorkloadConfig
) -> dict[str, Any]:
    """Only the columns that name the run if it fits in no way."""
    config = _epoch_config(model, *variant)
    row: dict[str, Any] = {
        "model": model,
        "integration": _variant_name(*variant),
        "GPU": cluster.gpu.name,
        "GPUs": cluster.gpus,
    }
    best = cheapest(search(config, cluster, workload, POLICIES))
    if best is None:
        return row
    hours = total_steps(config, workload) * best.step_s / 3600
    return row | {
        "how": f"{best.zero}{'+ckpt' if best.gradient_checkpointing else ''} x{best.micro_batch_size}",
        "GiB": best.memory_gib["total"],
        "step s": best.step_s,
        "mfu": best.mfu,
        "h": hours,
        "cost": hours * cluster.gpus * cluster.price_per_gpu_hour,
    }


def _epoch_config(model: str, integration: str, packed: int) -> ExperimentConfig:
    values = {
        "output": "unused",
        "model": {"language_model": model, "integration": integration, "encoders": [ENCODER]},
        "data": {"train": "unused", "questions_per_sequence": packed},
        "train": {"epochs": 1, "global_batch_size": BATCH, "micro_batch_size": 1},
    }
    return validate_config(ExperimentConfig, values, "the table")


def _variant_name(integration: str, packed: int) -> str:
    return integration if packed == 1 else f"{integration}, {packed} packed"
