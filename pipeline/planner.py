"""Predicts memory, step time and cost of a run from its config, a cluster and a workload. Needs no GPU, no weights and
no DeepSpeed: the model is built on torch's meta device, bytes and operations are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from pipeline import assembly, zero
from pipeline.config import ExperimentConfig, ModelConfig, TrainConfig
from pipeline.config.planning import ClusterConfig, EncoderWork, WorkloadConfig
from pipeline.data.shards import open_feature_set
from pipeline.errors import UserError
from pipeline.features import load_contract, require_encoders
from pipeline.model import PalConfig, PalForCausalLM
from pipeline.model.activations import activation_bytes
from pipeline.model.flops import RowShape, count_operations, sequence_shape, training_flops
from pipeline.model.shapes import published_shape
from pipeline.zero.memory import zero_memory

GIB, GB, TERA = 2**30, 1e9, 1e12
SECONDS_PER_DAY = 86400
SAMPLED_CLIPS = 256
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Read and written for each trained element in an optimizer step: gradient, master copy and two states in fp32; the
# plain Adam of a CPU goes over them operation by operation.
ADAM_TRAFFIC = {True: 28, False: 80}
# Of each byte that is kept: operations run one by one, each reads and writes, forward and for the gradient. A CPU also
# pays for fresh pages; its number is fitted.
PASS_TRAFFIC = {True: 8, False: 21}
FEATURE_BYTES = 2  # float16
QUESTION_BYTES = 250  # of a question with its answer and names, in a shard


@dataclass(frozen=True)
class ModelSize:
    """A model without weights: elements of its parameters, trained ones by parameter group."""

    config: PalConfig
    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        return self.trained + sum(self.frozen)


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


def language_model_config(name: str) -> PretrainedConfig:
    """The config of a Hugging Face folder or Hub name; of published shapes without a network.

    Raises:
        UserError: neither can be read.
    """
    shape = published_shape(name)
    if shape is not None:
        return shape
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        fault = f"'{name}' cannot be read ({str(error).splitlines()[0]})"
        raise UserError("model.language_model", fault, "give a Hugging Face folder or Hub name") from error


def model_size(config: ExperimentConfig, workload: WorkloadConfig) -> ModelSize:
    """Builds the model of a config on the meta device and counts.

    Raises:
        UserError: layers that the language model does not have, or an encoder that the workload does not know.
    """
    for name in config.model.encoders:
        if name not in workload.encoders:
            known = ", ".join(workload.encoders)
            raise UserError("model.encoders", f"'{name}' is not in the workload ({known})", "change one of the two")
    return _model_size(_Sized(config.model, config.train, workload.encoders))


class _Sized:
    """What the size of a model depends on; equal by value, so that a search builds each model once."""

    def __init__(self, model: ModelConfig, train: TrainConfig, encoders: dict[str, EncoderWork]) -> None:
        self.model, self.train, self.encoders = model, train, encoders
        shapes = {name: (work.width, work.grid) for name, work in encoders.items()}
        self.key = repr((model, train.trainable, train.lora, shapes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sized) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=64)
def _model_size(sized: _Sized) -> ModelSize:
    settings, encoders = sized.model, sized.encoders
    language_model = language_model_config(settings.language_model)
    config = PalConfig(
        language_model,
        settings.resolve_streams(language_model.num_hidden_layers),
        {name: encoders[name].width for name in settings.encoders},
        encoder_grids={name: grid for name in settings.encoders if (grid := encoders[name].grid)},
        norm_audio_tokens=settings.norm_audio_tokens,
        audio_queries=settings.audio_queries,
    )
    with torch.device("meta"):
        model = PalForCausalLM(config)
        assembly.choose_trained(model, sized.train)
    groups = [tuple(p.numel() for p in g.parameters) for g in assembly.parameter_groups(model, sized.train)]
    frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
    return ModelSize(config, tuple(g for g in groups if g), frozen)


def measure_workload(config: ExperimentConfig) -> WorkloadConfig:
    """The size of the training data that a config names: counts of its selected questions, lengths of a sample.

    Raises:
        UserError: the set does not exist or does not hold the encoders.
    """
    contract = load_contract(config.data.train)
    require_encoders(contract, config.model.encoders, config.data.train)
    features = open_feature_set(config.data.train, config.model.encoders, config.data)
    _, chat = assembly.build_chat(config)
    selected = features.table.select(config.data.tasks, config.data.datasets)
    sample = features.table.clip[selected[np.linspace(0, len(selected) - 1, SAMPLED_CLIPS).astype(np.int64)]]
    rows = [chat.row(features.clip(int(clip)).questions[:1]) for clip in sample]
    before = len(chat.prefix) - 1  # without the placeholder
    return WorkloadConfig(
        clips=len(np.unique(features.table.clip[selected])),
        questions=len(selected),
        clip_s=float(np.mean(features.table.duration_s[sample])),
        encoders={
            name: EncoderWork(frame_rate_hz=e.frame_rate_hz, width=e.width, grid=e.grid)
            for name, e in contract.encoders.items()
        },
        system_tokens=before,
        question_tokens=max(1, round(float(np.mean([len(row.input_ids) - before - 1 for row in rows])))),
        answer_tokens=max(1, round(float(np.mean([(row.labels >= 0).sum() for row in rows])))),
    )


def row_shape(config: ExperimentConfig, workload: WorkloadConfig) -> RowShape:
    """The mean row of a batch."""
    questions = config.data.questions_per_sequence
    carries_loss = workload.answer_tokens if config.train.loss_on == "answer" else workload.question_tokens
    frames = {n: round(workload.clip_s * workload.encoders[n].frame_rate_hz) for n in config.model.encoders}
    return RowShape(workload.system_tokens, [workload.question_tokens] * questions, carries_loss * questions, frames)


def step_tokens(config: ExperimentConfig, workload: WorkloadConfig) -> float:
    """Text tokens of an optimizer step."""
    packed = config.data.questions_per_sequence
    sequences = config.train.global_batch_size / packed
    return sequences * (workload.system_tokens + packed * workload.question_tokens)


def run_flops(config: ExperimentConfig, workload: WorkloadConfig) -> float:
    """Operations of the whole run."""
    flops = training_flops(model_size(config, workload).config, row_shape(config, workload), config.train.trainable)
    sequences = config.train.global_batch_size / config.data.questions_per_sequence
    return float(flops * sequences * total_steps(config, workload))


def total_steps(config: ExperimentConfig, workload: WorkloadConfig) -> int:
    """Optimizer steps of the run."""
    train = config.train
    if train.tokens is not None:
        return math.ceil(train.tokens / step_tokens(config, workload))
    per_epoch = math.ceil(workload.questions / train.global_batch_size)
    return train.steps or math.ceil((train.epochs or 0) * per_epoch)


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
    rendered = zero.render(train.zero, train, world_size=cluster.gpus, accumulation=accumulation, on_gpu=on_gpu)
    b = ELEMENT_BYTES[train.precision]
    held = zero_memory(rendered, size.groups, size.frozen, world_size=cluster.gpus, on_gpu=on_gpu)

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
    seconds = _seconds(config, cluster, workload, rendered, rows)
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
    config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig, rendered: dict[str, Any], rows: int
) -> dict[str, float]:
    """What a step of so many rows on each rank takes by itself; `passes` are made of `products`, `traffic` of all other
    operations through the memory, and `launches` by the host, which a GPU hides as long as it is busy."""
    train, gpu, size, row = config.train, cluster.gpu, model_size(config, workload), row_shape(config, workload)
    b, on_gpu, passes = ELEMENT_BYTES[train.precision], gpu.device == "cuda", rendered["gradient_accumulation_steps"]
    flops, counted = training_flops(size.config, row, train.trainable), count_operations(size.config, row)
    kept = activation_bytes(size.config, row, element_bytes=b, trainable=train.trainable, on_gpu=on_gpu)
    touched = PASS_TRAFFIC[on_gpu] * (kept.kept + kept.loss)
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
        "optimizer": _optimizer_s(rendered, size, cluster, b),
        "communication": _communication_s(rendered, size, cluster, b),
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


def _optimizer_s(rendered: dict[str, Any], size: ModelSize, cluster: ClusterConfig, b: int) -> float:
    """Adam is bound by memory: of the GPU, or of the host that ranks of a node share."""
    policy = rendered["zero_optimization"]
    own = size.trained / (cluster.gpus if policy["stage"] else 1)
    traffic = own * (ADAM_TRAFFIC[cluster.gpu.device == "cuda"] + b)
    if "offload_optimizer" not in policy:
        return traffic / (cluster.gpu.memory_gb_s * GB)
    through_link = own * (4 + b) / (cluster.host_link_gb_s * GB)
    return traffic * cluster.gpus_per_node / (cluster.host_memory_gb_s * GB) + through_link


def _communication_s(rendered: dict[str, Any], size: ModelSize, cluster: ClusterConfig, b: int) -> float:
    """Bytes through the slowest link of a ring over all ranks (all-gather and reduce-scatter move (W - 1) / W of the
    whole through every link, all-reduce twice that) over its bandwidth."""
    if cluster.gpus == 1:
        return 0.0
    policy, passes = rendered["zero_optimization"], rendered["gradient_accumulation_steps"]
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


def search(
    config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig, policies: Sequence[str] | None = None
) -> list[Prediction]:
    """Every shipped ZeRO policy, with and without checkpointing, at every micro-batch of a power of two that divides.

    Args:
        policies: only these; None means all that need no folder of their own.
    """
    if policies is None:
        policies = sorted(p.stem for p in zero.POLICIES.glob("*.json") if "nvme" not in p.stem)
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


def extraction(cluster: ClusterConfig, workload: WorkloadConfig, encoders: Sequence[str]) -> dict[str, float]:
    """Hours of preparing the features on the cluster, and what they take on disk.

    Encoders run on all GPUs at the cluster's efficiency in half precision while all cores decode: the slower decides.
    """
    audio_s, works = workload.clips * workload.clip_s, [workload.encoders[name] for name in encoders]
    flops = audio_s * sum(work.gflop_per_audio_s for work in works) * 1e9
    peak = max(cluster.gpu.peak_tflops.values()) * TERA * cluster.efficiency * cluster.gpus
    decode_s = audio_s / (cluster.audio_s_per_core_s * cluster.cores_per_node * cluster.nodes)
    stored = audio_s * FEATURE_BYTES * sum(work.frame_rate_hz * work.width for work in works)
    return {
        "hours": max(flops / peak, decode_s) / 3600,
        "encoder_hours": flops / peak / 3600,
        "decoding_hours": decode_s / 3600,
        "storage_gib": (stored + workload.questions * QUESTION_BYTES) / GIB,
    }
