"""Bytes that DeepSpeed holds for a model on this rank, read off its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.engine.engine import Engine


def state_bytes(engine: Engine) -> dict[str, int]:
    """Returns the bytes of `parameters`, `gradients` and `optimizer` states in host memory.

    Gradients are those of the last backward pass; call this before the optimizer step.
    """
    deepspeed_engine = engine._engine
    model, outer = deepspeed_engine.module, deepspeed_engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    partitions = [t for p in model.parameters() if (t := getattr(p, "ds_tensor", None)) is not None]
    parameters = [*model.parameters(), *partitions]
    states = [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor) and t.numel() > 1]
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(outer, "fp32_partitioned_groups_flat", [])  # stage 3 lends them to the optimizer for a step
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [t for part in getattr(outer, "averaged_gradients", {}).values() for t in part or []]
    gradients += getattr(outer, "fp32_groups_gradients_flat", [])
    if getattr(outer, "grad_partitions_flat_buffer", None) is not None:
        gradients.append(outer.grad_partitions_flat_buffer)
    model_storages = {t.untyped_storage().data_ptr() for t in parameters}
    return {
        "parameters": storage_bytes(parameters),
        "gradients": storage_bytes(gradients),
        "optimizer": storage_bytes(
            t for t in [*states, *masters] if t.untyped_storage().data_ptr() not in model_storages
        ),
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of these tensors in host memory; storage that several of them share counts once."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
