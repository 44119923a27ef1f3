"""What DeepSpeed 0.19 holds on each rank under a ds_config config: bytes, by arithmetic, without DeepSpeed or a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FP32 = 4
ADAM_STATES = 2 * FP32
MASTER = FP32
ALL_REDUCE_ELEMENTS = 500_000_000  # of a bucket where DeepSpeed reduces whole gradients (stages 0, and 1 in bf16)


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes on one rank.

    Attributes:
        parameters: the model in its own precision; under stage 3 this rank's partition and what is never partitioned.
        gradients: what lies between the last backward pass and the optimizer step, reduced.
        optimizer: fp32 master copies and Adam's two states.
        gathered: parameters of other ranks that stage 3 keeps for the passes.
        carried, fresh: gradients that are there before a backward pass, allocated once or added up over micro-batches;
            and those that appear in it.
        buckets: of the reduction, during the backward pass.
        step: what the optimizer step, or a reduction between it and the passes, needs on top of the first three.
        host: on the host instead, for each rank.
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

    def peak(self, kept: int, loss: int, layer: int) -> int:
        """Most bytes at any time of a step, with these activations (see `pipeline.cost.activations`)."""
        states = self.parameters + self.optimizer
        passes = states + self.gathered
        at_loss = passes + self.carried + kept + loss
        # Activations make room for gradients that were not there before.
        in_layers = passes + self.carried + self.buckets + layer + max(kept, self.fresh)
        return max(at_loss, in_layers, states + self.gradients + self.step)


def zero_memory(
    ds_config: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    frozen: Sequence[int],
    *,
    world_size: int,
    on_gpu: bool,
) -> ZeroMemory:
    """Counts what a run holds.

    Args:
        ds_config: from `pipeline.engine.build_ds_config`.
        groups: elements of each trained parameter, by parameter group.
        frozen: elements of each parameter that is not trained.
    """
    policy = ds_config["zero_optimization"]
    stage, accumulates = policy["stage"], ds_config["gradient_accumulation_steps"] > 1
    b = 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else FP32
    trained = sum(map(sum, groups))
    largest = max((n for group in groups for n in group), default=0)
    # Without its fused form Adam makes two temporaries of one tensor at a time.
    temporaries = 0 if on_gpu else 2 * FP32

    if stage == 0:
        reduced = b * min(trained, ALL_REDUCE_ELEMENTS + largest)
        step = temporaries * largest + (FP32 * trained if b < FP32 else 0)
        masters = MASTER if b < FP32 else 0
        return ZeroMemory(
            parameters=b * (trained + sum(frozen)),
            gradients=b * trained,
            optimizer=(masters + ADAM_STATES) * trained,
            gathered=0,
            carried=b * trained * accumulates,
            fresh=b * trained * (not accumulates),
            buckets=0,
            step=max(step, reduced),
        )

    offloads = "offload_optimizer" in policy
    on_host = offloads and policy["offload_optimizer"]["device"] == "cpu"  # the other place is a disk
    if stage == 3:
        own = [[-(-n // world_size) for n in group] for group in groups]
        partition = sum(map(sum, own))
        others = sum(-(-n // world_size) for n in frozen)
        everything = [*frozen, *(n for group in groups for n in group)]
        whole = sum(n for n in everything if n < policy["stage3_param_persistence_threshold"])
        live = min(sum(everything) - whole, policy["stage3_max_live_parameters"] + largest) if world_size > 1 else 0
        sub_group = min(partition, policy["sub_group_size"] + largest // world_size)
        parameters = b * (partition + others) * ("offload_param" not in policy) + b * whole * (world_size > 1)
        states, gradients = (MASTER + ADAM_STATES) * partition, FP32 * partition
        return ZeroMemory(
            parameters=parameters,
            gradients=0 if offloads else gradients,
            optimizer=0 if offloads else states,
            gathered=b * live,
            carried=0 if offloads else gradients,
            fresh=0,
            buckets=b * 2 * policy["reduce_bucket_size"],
            step=0 if offloads else (FP32 + temporaries) * sub_group,
            host=(states + 2 * gradients) * on_host
            + b * (partition + others) * (policy.get("offload_param", {}).get("device") == "cpu"),
        )

    format_table = 2 * world_size
    padded = [math.ceil(sum(group) / format_table) * format_table for group in groups]
    flat, partition = sum(padded), sum(padded) // world_size
    parameters, states = b * (flat + sum(frozen)), (MASTER + ADAM_STATES) * partition
    largest_partition = max(padded, default=0) // world_size
    if stage == 1 and ds_config["bf16"]["enabled"]:
        # DeepSpeed's BF16_Optimizer: gradients in both precisions, reduced all together through a copy of each.
        return ZeroMemory(
            parameters=parameters,
            gradients=FP32 * flat + b * trained,
            optimizer=states,
            gathered=0,
            carried=FP32 * flat + b * trained,
            fresh=0,
            buckets=0,
            step=max(temporaries * largest_partition, (FP32 + b) * flat),
        )
    buckets = 2 * policy["reduce_bucket_size"] * (FP32 if stage == 1 else b)
    oversized = max((n for group in groups for n in group if n > policy["reduce_bucket_size"]), default=0)
    gradients = FP32 * partition
    return ZeroMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=0 if offloads else states,
        gathered=0,
        carried=(FP32 * flat if stage == 1 else gradients) * accumulates,
        # Stage 1 adds up in place, and so does stage 2 in half precision; in fp32 it adds new ones to the old.
        fresh=gradients if not accumulates or (stage == 2 and b == FP32) else 0,
        buckets=buckets + b * oversized,
        step=temporaries * largest_partition + (FP32 * largest_partition if b == FP32 else 0),
        host=(states + FP32 * partition + b * partition) * on_host,
    )
