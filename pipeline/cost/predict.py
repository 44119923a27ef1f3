"""Predicts memory and step time of one way to run a config. Needs no GPU, no weights and no DeepSpeed: bytes and
operations are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.core.errors import UserError
from pipeline.core.units import GB, GIB, TERA
from pipeline.cost.activations import Execution, activation_bytes
from pipeline.cost.extraction import FEATURE_BYTES
from pipeline.cost.flops import RowShape, count_operations, sequence_shape, training_flops
from pipeline.cost.memory import zero_memory
from pipeline.cost.workload import ModelSize, model_size, row_shape
from pipeline.engine import build_ds_config

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes read and written for each trained element in an optimizer step: gradient, master copy and two states in fp32;
# the plain Adam of a CPU goes over them operation by operation.
ADAM_TRAFFIC = {True: 28, False: 80}
# Bytes read and written for each saved byte: operations run one by one, forward and for the gradient.
PASS_TRAFFIC = 8


@dataclass(frozen=True)
class Prediction:
    """Memory and time of one way to run a config.

    Attributes:
        memory_gib: memory of one GPU by part. `total` is the peak, which is below the sum because some parts do not
            exist at the same time; `buffers` belong to collectives and the optimizer step, `audio` is what audio adds
            to the activations.
        host_gib: memory that a whole node needs on its host.
        step_s: duration of an optimizer step; `seconds` are its parts before they overlap.
        mfu: share of the GPU's peak spent on operations of the model; recomputation does not count.
        does_not_fit: the reason why it does not fit; empty if it does.
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


@dataclass(frozen=True)
class _Run:
    """What a prediction is computed from; `rows` are those of each rank in a step."""

    config: ExperimentConfig
    cluster: ClusterConfig
    workload: WorkloadConfig
    size: ModelSize
    row: RowShape
    rows: int
    ds_config: dict[str, Any]

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.config.train.precision]

    @property
    def peak_flops(self) -> float:
        return self.cluster.gpu.peak_tflops[self.config.train.precision] * TERA

    @property
    def passes(self) -> int:
        """Forward and backward passes of one step."""
        return int(self.ds_config["gradient_accumulation_steps"])

    def execution(self, *, checkpointing: bool) -> Execution:
        train, on_gpu = self.config.train, self.cluster.gpu.device == "cuda"
        return Execution(self.element_bytes, train.trainable, checkpointing, on_gpu)


def predict(config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Prediction:
    """Predicts memory and time of a config as it is written.

    Raises:
        UserError: the batch does not divide over the cluster, or the model cannot be built.
    """
    train, gpu, size = config.train, cluster.gpu, model_size(config, workload)
    on_gpu = gpu.device == "cuda"
    if train.precision not in gpu.peak_tflops:
        raise UserError("gpu.peak_tflops", f"has no value for {train.precision}", "add it to the cluster file")
    row = row_shape(config, workload)
    micro, accumulation = _micro_batches(config, cluster, size, row)
    ds_config = build_ds_config(train.zero, train, world_size=cluster.gpus, accumulation=accumulation, on_gpu=on_gpu)
    run = _Run(config, cluster, workload, size, row, config.rows_per_rank(cluster.gpus), ds_config)
    zero = zero_memory(ds_config, size.groups, size.frozen, world_size=cluster.gpus, on_gpu=on_gpu)

    execution = run.execution(checkpointing=train.gradient_checkpointing)
    activations = activation_bytes(size.config, row, execution)
    without_audio = activation_bytes(size.config, replace(row, frames={}), execution)
    peak = zero.peak(micro * activations.saved, micro * activations.loss, micro * activations.layer)
    memory = {
        "parameters": zero.parameters,
        "gradients": zero.gradients,
        "optimizer": zero.optimizer,
        "buffers": zero.gathered + max(zero.buckets, zero.step),
        "activations": micro * without_audio.peak,
        "audio": micro * (activations.peak - without_audio.peak),
        "total": peak,
    }

    seconds = _seconds(run)
    busy_s = seconds["passes"] + seconds["optimizer"]
    overlapped = cluster.overlap * seconds["communication"]
    step_s = max(busy_s + seconds["communication"] - overlapped, seconds["communication"], seconds["reading"])
    flops = training_flops(size.config, row, train.trainable) * run.rows
    text_tokens = row.system_tokens + sum(row.question_tokens)
    return Prediction(
        zero=train.zero,
        micro_batch_size=micro,
        gradient_checkpointing=train.gradient_checkpointing,
        memory_gib={part: value / GIB for part, value in memory.items()},
        host_gib=zero.host * cluster.gpus_per_node / GIB,
        step_s=step_s,
        seconds=seconds,
        mfu=flops / (step_s * gpu.peak_tflops[train.precision] * TERA),
        tokens_per_s=text_tokens * run.rows * cluster.gpus / step_s,
        does_not_fit=_why_not(memory, zero.host, cluster),
    )


def _micro_batches(config: ExperimentConfig, cluster: ClusterConfig, size: ModelSize, row: RowShape) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a step; where tokens bound a micro-batch, those of mean length."""
    rows, train = config.rows_per_rank(cluster.gpus), config.train
    micro = min(train.micro_batch_size, rows)
    if train.micro_batch_tokens is not None:
        micro = max(1, min(micro, train.micro_batch_tokens // sequence_shape(size.config, row).length))
    return micro, math.ceil(rows / micro)


def _why_not(memory: dict[str, int], host: int, cluster: ClusterConfig) -> str:
    usable = cluster.gpu.memory_gib * cluster.usable_memory
    total, on_host = memory["total"] / GIB, host * cluster.gpus_per_node / GIB
    if total > usable:
        largest = max((part for part in memory if part != "total"), key=lambda part: memory[part])
        share = memory[largest] / GIB
        return f"needs {total:.1f} GiB of {usable:.1f} usable, most for {largest} ({share:.1f})"
    if on_host > cluster.host_memory_gib:
        return f"needs {on_host:.0f} GiB of the host's {cluster.host_memory_gib:.0f}"
    return ""


def _seconds(run: _Run) -> dict[str, float]:
    """Durations of the parts of a step, each by itself.

    `passes` consist of `products`, of `traffic` (all other operations, bound by memory) and of `launches` by the host,
    which a GPU hides as long as it is busy.
    """
    cluster, size, row, train = run.cluster, run.size, run.row, run.config.train
    gpu = cluster.gpu
    flops = training_flops(size.config, row, train.trainable)
    activations = activation_bytes(size.config, row, run.execution(checkpointing=False))
    moved = PASS_TRAFFIC * (activations.saved + activations.loss)
    launches = run.passes * size.config.language_model.num_hidden_layers * cluster.layer_launch_s
    if train.gradient_checkpointing:
        launches *= 4 / 3  # a second forward pass
        forward = count_operations(size.config, row)
        flops += forward.total - forward.vocabulary - forward.features
        moved = moved * 5 // 4
    products = flops * run.rows / (run.peak_flops * cluster.efficiency)
    weights = 3 * run.element_bytes * size.total * run.passes  # read for three products
    traffic = (moved * run.rows + weights) / (gpu.memory_gb_s * GB)
    features = sum(row.frames[name] * run.workload.encoders[name].width for name in row.frames)
    feature_bytes = FEATURE_BYTES * features * run.rows * cluster.gpus_per_node
    return {
        "products": products,
        "traffic": traffic,
        "launches": launches,
        "passes": max(products + traffic, launches) if gpu.device == "cuda" else products + traffic + launches,
        "optimizer": _optimizer_s(run),
        "communication": _communication_s(run),
        "reading": feature_bytes / (cluster.disk_gb_s * GB),
    }


def _optimizer_s(run: _Run) -> float:
    """Duration of Adam, which is bound by memory: of the GPU, or of the host that the ranks of a node share."""
    policy, cluster = run.ds_config["zero_optimization"], run.cluster
    elements = run.size.trained / (cluster.gpus if policy["stage"] else 1)
    traffic = elements * (ADAM_TRAFFIC[cluster.gpu.device == "cuda"] + run.element_bytes)
    if "offload_optimizer" not in policy:
        return traffic / (cluster.gpu.memory_gb_s * GB)
    through_link = elements * (4 + run.element_bytes) / (cluster.host_link_gb_s * GB)
    return traffic * cluster.gpus_per_node / (cluster.host_memory_gb_s * GB) + through_link


def _communication_s(run: _Run) -> float:
    """Duration of the collectives: bytes through the slowest link of a ring over all ranks, over its bandwidth.

    All-gather and reduce-scatter move (W - 1) / W of the whole through every link, all-reduce twice that.
    """
    cluster, size, passes = run.cluster, run.size, run.passes
    if cluster.gpus == 1:
        return 0.0
    policy, b = run.ds_config["zero_optimization"], run.element_bytes
    gradients, stage = b * size.trained, policy["stage"]
    tensors = len(size.frozen) + sum(map(len, size.groups))
    calls = 1 + passes * size.trained // policy["reduce_bucket_size"] if stage in (1, 2) else 1
    moved: float
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
