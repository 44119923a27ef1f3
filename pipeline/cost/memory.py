"""Bytes that DeepSpeed 0.19 holds on each rank under one of its configs, by arithmetic, without DeepSpeed or a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FP32 = 4
ADAM_STATES = 2 * FP32
MASTER = FP32
ALL_REDUCE_ELEMENTS = 500_000_000  # in one bucket where DeepSpeed reduces whole gradients (stages 0, and 1 in bf16)


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes on one rank.

    Attributes:
        parameters: bytes of the model in its own precision; under stage 3 of this rank's partition, and of what is
            never partitioned.
        gradients: bytes of reduced gradients between the last backward pass and the optimizer step.
        optimizer: bytes of fp32 master copies and of Adam's two states.
        gathered: bytes of other ranks' parameters that stage 3 holds during the passes.
        carried: bytes of gradients that exist before a backward pass, allocated once or summed over micro-batches.
        fresh: bytes of gradients that appear during a backward pass.
        buckets: bytes of the reduction's buckets during the backward pass.
        step: bytes that the optimizer step, or a reduction just before it, needs on top of the first three.
        host: bytes that each rank holds on the host instead.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    carried: int
    fresh: int
    buckets: int
    step: int
    host: int = 0

    def peak(self, saved: int, loss: int, layer: int) -> int:
        """Returns the most bytes at any time of a step; see `activations.Activations` for the arguments."""
        states = self.parameters + self.optimizer
        passes = states + self.gathered
        at_loss = passes + self.carried + saved + loss
        # Activations are freed while these gradients appear.
        in_layers = passes + self.carried + self.buckets + layer + max(saved, self.fresh)
        return max(at_loss, in_layers, states + self.gradients + self.step)


@dataclass(frozen=True)
class _Elements:
    """Elements of the parameters: trained ones by parameter group, and frozen ones.

    Attributes:
        element_bytes: bytes of one element in the model's precision.
        temporaries: bytes of one element in Adam's temporary tensors, of one parameter at a time.
    """

    groups: Sequence[Sequence[int]]
    frozen: Sequence[int]
    element_bytes: int
    temporaries: int

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest_trained(self) -> int:
        return max((n for group in self.groups for n in group), default=0)


def zero_memory(
    ds_config: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    frozen: Sequence[int],
    *,
    world_size: int,
    on_gpu: bool,
) -> ZeroMemory:
    """Counts what one rank holds.

    Args:
        ds_config: config of DeepSpeed from `pipeline.engine.build_ds_config`.
        groups: elements of each trained parameter, by parameter group.
        frozen: elements of each parameter that is not trained.
    """
    elements = _Elements(
        groups,
        frozen,
        element_bytes=2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else FP32,
        temporaries=0 if on_gpu else 2 * FP32,  # the fused Adam of a GPU makes none
    )
    stage = ds_config["zero_optimization"]["stage"]
    if stage == 0:
        return _stage_0(ds_config, elements)
    if stage == 3:
        return _stage_3(ds_config, elements, world_size)
    if stage == 1 and ds_config["bf16"]["enabled"]:
        return _stage_1_bf16(elements, world_size)
    return _stages_1_and_2(ds_config, elements, world_size)


def _stage_0(ds_config: Mapping[str, Any], elements: _Elements) -> ZeroMemory:
    b, trained, largest = elements.element_bytes, elements.trained, elements.largest_trained
    accumulates = _accumulates(ds_config)
    reduced = b * min(trained, ALL_REDUCE_ELEMENTS + largest)
    step = elements.temporaries * largest + (FP32 * trained if b < FP32 else 0)
    masters = MASTER if b < FP32 else 0
    return ZeroMemory(
        parameters=b * (trained + sum(elements.frozen)),
        gradients=b * trained,
        optimizer=(masters + ADAM_STATES) * trained,
        gathered=0,
        carried=b * trained * accumulates,
        fresh=b * trained * (not accumulates),
        buckets=0,
        step=max(step, reduced),
    )


def _stage_1_bf16(elements: _Elements, world_size: int) -> ZeroMemory:
    """DeepSpeed's BF16_Optimizer: gradients in both precisions, reduced all together through a copy of each."""
    b = elements.element_bytes
    padded = _padded_groups(elements, world_size)
    both_gradients = FP32 * sum(padded) + b * elements.trained
    largest_partition = max(padded, default=0) // world_size
    return ZeroMemory(
        parameters=b * (sum(padded) + sum(elements.frozen)),
        gradients=both_gradients,
        optimizer=(MASTER + ADAM_STATES) * (sum(padded) // world_size),
        gathered=0,
        carried=both_gradients,
        fresh=0,
        buckets=0,
        step=max(elements.temporaries * largest_partition, (FP32 + b) * sum(padded)),
    )


def _stages_1_and_2(ds_config: Mapping[str, Any], elements: _Elements, world_size: int) -> ZeroMemory:
    """Stage 1 in fp32 and fp16, stage 2 in every precision."""
    policy, b, accumulates = ds_config["zero_optimization"], elements.element_bytes, _accumulates(ds_config)
    stage, bucket = policy["stage"], policy["reduce_bucket_size"]
    padded = _padded_groups(elements, world_size)
    flat, partition = sum(padded), sum(padded) // world_size
    largest_partition = max(padded, default=0) // world_size
    states, gradients = (MASTER + ADAM_STATES) * partition, FP32 * partition
    oversized = max((n for group in elements.groups for n in group if n > bucket), default=0)
    return ZeroMemory(
        parameters=b * (flat + sum(elements.frozen)),
        gradients=gradients,
        optimizer=0 if "offload_optimizer" in policy else states,
        gathered=0,
        carried=(FP32 * flat if stage == 1 else gradients) * accumulates,
        # Stage 1 adds up in place, and so does stage 2 in half precision; in fp32 it adds new ones to the old.
        fresh=gradients if not accumulates or (stage == 2 and b == FP32) else 0,
        buckets=2 * bucket * (FP32 if stage == 1 else b) + b * oversized,
        step=(elements.temporaries + (FP32 if b == FP32 else 0)) * largest_partition,
        host=(states + gradients + b * partition) * _offloads_to_host(policy, "offload_optimizer"),
    )


def _stage_3(ds_config: Mapping[str, Any], elements: _Elements, world_size: int) -> ZeroMemory:
    policy, b, largest = ds_config["zero_optimization"], elements.element_bytes, elements.largest_trained
    every_tensor = [*elements.frozen, *(n for group in elements.groups for n in group)]
    trained_part = sum(-(-n // world_size) for group in elements.groups for n in group)
    part = trained_part + sum(-(-n // world_size) for n in elements.frozen)
    persistent = sum(n for n in every_tensor if n < policy["stage3_param_persistence_threshold"])
    live = min(sum(every_tensor) - persistent, policy["stage3_max_live_parameters"] + largest) * (world_size > 1)
    sub_group = min(trained_part, policy["sub_group_size"] + largest // world_size)
    states, gradients = (MASTER + ADAM_STATES) * trained_part, FP32 * trained_part
    on_device = "offload_optimizer" not in policy
    return ZeroMemory(
        parameters=b * part * ("offload_param" not in policy) + b * persistent * (world_size > 1),
        gradients=gradients * on_device,
        optimizer=states * on_device,
        gathered=b * live,
        carried=gradients * on_device,
        fresh=0,
        buckets=b * 2 * policy["reduce_bucket_size"],
        step=(FP32 + elements.temporaries) * sub_group * on_device,
        host=(states + 2 * gradients) * _offloads_to_host(policy, "offload_optimizer")
        + b * part * _offloads_to_host(policy, "offload_param"),
    )


def _accumulates(ds_config: Mapping[str, Any]) -> bool:
    return bool(ds_config["gradient_accumulation_steps"] > 1)


def _padded_groups(elements: _Elements, world_size: int) -> list[int]:
    """Elements of each parameter group, flattened and padded to whole partitions of even length."""
    alignment = 2 * world_size
    return [math.ceil(sum(group) / alignment) * alignment for group in elements.groups]


def _offloads_to_host(policy: Mapping[str, Any], section: str) -> bool:
    """Whether this section offloads to the host's memory; the other choice is a disk."""
    return bool(policy.get(section, {}).get("device") == "cpu")
