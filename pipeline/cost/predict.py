"""Predicts memory and step time of one way to run a config. Needs no GPU, no weights and no DeepSpeed: bytes and
operations are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.core.errors import UserError
from pipeline.cost.activations import activation_bytes
from pipeline.cost.extraction import FEATURE_BYTES
from pipeline.cost.flops import RowShape, count_operations, sequence_shape, training_flops
from pipeline.cost.memory import zero_memory
from pipeline.cost.workload import ModelSize, model_size, row_shape
from pipeline.engine import build_ds_config

GIB, GB, TERA = 2**30, 1e9, 1e12
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Read and written for each trained element in an optimizer step: gradient, master copy and two states in fp32; the
# plain Adam of a CPU goes over them operation by operation.
ADAM_TRAFFIC = {True: 28, False: 80}
# Of each byte that is kept: operations run one by one, each reads and writes, forward and for the gradient.
PASS_TRAFFIC = 8


@dataclass(frozen=True)
class Prediction:
    """One way to run a config.

    Attributes:
        memory_gib: per GPU, by part. `total` is the peak, less than the sum of parts that are not there together;
            `buffers` are of collectives and of the optimizer step, `audio` is what the activations grow by through
            audio.
        step_s: of the optimizer step; `seconds` are its parts, before they hide behind each other.
        mfu: share of the peak spent on operations of the model, recomputation not counted.
        does_not_fit: why not; empty if it fits.
    """

    zero: str
    micro_batch_size: int
    gradient_checkpointing: bool
    memory_gib: dict[str, float]
    host_gib: float
    step_s: float
    seconds: dict[str, float]
    mfu: float
    tokens_per_s: float
    does_not_fit: str


def predict(config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Prediction:
    """Memory and time of a config as it is written.

    Raises:
        UserError: the batch does not divide over the cluster, or the model cannot be built.
    """
    train, gpu, size = config.train, cluster.gpu, model_size(config, workload)
    on_gpu = gpu.device == "cuda"
    if train.precision not in gpu.peak_tflops:
        raise UserError("gpu.peak_tflops", f"says nothing of {train.precision}", "add it to the cluster file")
    row = row_shape(config, workload)
    micro, accumulation = _micro_batches(config, cluster, size, row)
    ds_config = build_ds_config(train.zero, train, world_size=cluster.gpus, accumulation=accumulation, on_gpu=on_gpu)
    b = ELEMENT_BYTES[train.precision]
    held = zero_memory(ds_config, size.groups, size.frozen, world_size=cluster.gpus, on_gpu=on_gpu)

    count = partial(activation_bytes, size.config, element_bytes=b, trainable=train.trainable, on_gpu=on_gpu)
    checkpointing = train.gradient_checkpointing
    kept = count(row, checkpointing=checkpointing)
    silent = count(replace(row, frames={}), checkpointing=checkpointing)
    peak = held.peak(micro * kept.kept, micro * kept.loss, micro * kept.layer)
    memory = {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "buffers": held.gathered + max(held.buckets, held.step),
        "activations": micro * silent.peak,
        "audio": micro * (kept.peak - silent.peak),
        "total": peak,
    }

    rows = micro * accumulation
    seconds = _seconds(config, cluster, workload, ds_config, rows)
    busy_s = seconds["passes"] + seconds["optimizer"]
    hidden = cluster.overlap * seconds["communication"]
    step_s = max(busy_s + seconds["communication"] - hidden, seconds["communication"], seconds["reading"])
    flops = training_flops(size.config, row, train.trainable) * rows
    return Prediction(
        train.zero,
        micro,
        checkpointing,
        {part: value / GIB for part, value in memory.items()},
        held.host * cluster.gpus_per_node / GIB,
        step_s,
        seconds,
        mfu=flops / (step_s * gpu.peak_tflops[train.precision] * TERA),
        tokens_per_s=(row.system_tokens + sum(row.question_tokens)) * rows * cluster.gpus / step_s,
        does_not_fit=_why_not(memory, held.host, cluster),
    )


def _seconds(
    config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig, ds_config: dict[str, Any], rows: int
) -> dict[str, float]:
    """What a step of so many rows on each rank takes by itself; `passes` are made of `products`, `traffic` of all other
    operations through the memory, and `launches` by the host, which a GPU hides as long as it is busy."""
    train, gpu, size, row = config.train, cluster.gpu, model_size(config, workload), row_shape(config, workload)
    b, on_gpu, passes = ELEMENT_BYTES[train.precision], gpu.device == "cuda", ds_config["gradient_accumulation_steps"]
    flops, counted = training_flops(size.config, row, train.trainable), count_operations(size.config, row)
    kept = activation_bytes(size.config, row, element_bytes=b, trainable=train.trainable, on_gpu=on_gpu)
    touched = PASS_TRAFFIC * (kept.kept + kept.loss)
    launches = passes * size.config.language_model.num_hidden_layers * cluster.layer_launch_s
    if train.gradient_checkpointing:
        launches *= 4 / 3  # a second forward pass
        flops += counted.total - counted.vocabulary - counted.features
        touched = touched * 5 // 4
    products = flops * rows / (gpu.peak_tflops[train.precision] * TERA * cluster.efficiency)
    weights = 3 * b * size.total * passes  # read for three products
    traffic = (touched * rows + weights) / (gpu.memory_gb_s * GB)
    frames = sum(row.frames[name] * workload.encoders[name].width for name in row.frames)
    return {
        "products": products,
        "traffic": traffic,
        "launches": launches,
        "passes": max(products + traffic, launches) if on_gpu else products + traffic + launches,
        "optimizer": _optimizer_s(ds_config, size, cluster, b),
        "communication": _communication_s(ds_config, size, cluster, b),
        "reading": FEATURE_BYTES * frames * rows * cluster.gpus_per_node / (cluster.disk_gb_s * GB),
    }


def _micro_batches(config: ExperimentConfig, cluster: ClusterConfig, size: ModelSize, row: RowShape) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of a step; where their positions are bounded, of mean length."""
    accumulation, train = config.gradient_accumulation_steps(cluster.gpus), config.train
    if train.micro_batch_tokens is None:
        return train.micro_batch_size, accumulation
    _, positions, *_ = sequence_shape(size.config.stream_specs(), row)
    micro = max(1, min(train.micro_batch_size, train.micro_batch_tokens // positions))
    return micro, math.ceil(train.global_batch_size / (config.data.questions_per_sequence * cluster.gpus * micro))


def _why_not(memory: dict[str, int], host: int, cluster: ClusterConfig) -> str:
    usable = cluster.gpu.memory_gib * cluster.usable_memory
    if memory["total"] / GIB > usable:
        largest = max((part for part in memory if part != "total"), key=lambda part: memory[part])
        return (f"needs {memory['total'] / GIB:.1f} GiB of {usable:.1f} usable, "
                f"most for {largest} ({memory[largest] / GIB:.1f})")  # fmt: skip
    if host * cluster.gpus_per_node / GIB > cluster.host_memory_gib:
        return f"needs {host * cluster.gpus_per_node / GIB:.0f} GiB of the host's {cluster.host_memory_gib:.0f}"
    return ""


def _optimizer_s(ds_config: dict[str, Any], size: ModelSize, cluster: ClusterConfig, b: int) -> float:
    """Adam is bound by memory: of the GPU, or of the host that ranks of a node share."""
    policy = ds_config["zero_optimization"]
    own = size.trained / (cluster.gpus if policy["stage"] else 1)
    traffic = own * (ADAM_TRAFFIC[cluster.gpu.device == "cuda"] + b)
    if "offload_optimizer" not in policy:
        return traffic / (cluster.gpu.memory_gb_s * GB)
    through_link = own * (4 + b) / (cluster.host_link_gb_s * GB)
    return traffic * cluster.gpus_per_node / (cluster.host_memory_gb_s * GB) + through_link


def _communication_s(ds_config: dict[str, Any], size: ModelSize, cluster: ClusterConfig, b: int) -> float:
    """Bytes through the slowest link of a ring over all ranks (all-gather and reduce-scatter move (W - 1) / W of the
    whole through every link, all-reduce twice that) over its bandwidth."""
    if cluster.gpus == 1:
        return 0.0
    policy, passes = ds_config["zero_optimization"], ds_config["gradient_accumulation_steps"]
    gradients, stage = b * size.trained, policy["stage"]
    tensors = len(size.frozen) + sum(map(len, size.groups))
    calls = 1 + passes * size.trained // policy["reduce_bucket_size"] if stage in (1, 2) else 1
    if stage <= 1:
        moved = 2 * gradients + (gradients if stage == 1 else 0)
    elif stage == 2:  # reduces after every pass, and with use_multi_rank_bucket_allreduce the whole bucket to all ranks
        moved = passes * gradients * (2 if policy["use_multi_rank_bucket_allreduce"] else 1) + gradients
    else:
        gathers = 1 if size.total <= policy["stage3_max_live_parameters"] else 2
        calls = passes * (gathers + 1) * tensors
        moved = passes * (gathers * b * size.total + gradients)
        if "offload_param" in policy:
            moved += gathers * passes * b * size.total / cluster.gpus  # over the host's link first
    ring = (cluster.gpus - 1) / cluster.gpus
    slowest = min(cluster.within_node_gb_s, cluster.between_nodes_gb_s if cluster.nodes > 1 else math.inf)
    return moved * ring / (slowest * GB * cluster.bandwidth_efficiency) + calls * cluster.collective_latency_s
