"""The process group: how ranks connect, on which device, and how the loss of a rank is recognized."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks, set_single_rank_environment
from pipeline.engine.ds_config import zero_stage
from pipeline.engine.patches import listen_on_loopback, skip_shm_all_reduce

if TYPE_CHECKING:
    import torch


def init_process_group(ranks: Ranks, timeout_s: float) -> None:
    """Joins the process group: gloo on CPU, NCCL on GPUs.

    A collective that waits longer than `timeout_s` for another rank raises instead of hanging. On one machine, nothing
    listens beyond the loopback address.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    skip_shm_all_reduce()
    set_single_rank_environment()
    listen_on_loopback(os.environ["MASTER_ADDR"])
    get_accelerator().set_device(ranks.local_rank)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)


@contextmanager
def partitioned_loading(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, partitions each weight as transformers loads it within the block: no rank holds a whole model."""
    if zero_stage(ds_config) < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    hf_config = HfDeepSpeedConfig(dict(ds_config))  # must stay alive: transformers keeps only a weak reference
    try:
        yield
    finally:
        del hf_config
        unset_hf_deepspeed_config()


def gathered(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """Gathers parameters within the block, then partitions what rank 0 made of them; no effect below ZeRO-3."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def require_same_everywhere(values: Mapping[str, Any]) -> None:
    """Compares settings over all ranks, before a difference can hang or corrupt a run.

    Raises:
        UserError: a rank has a different value from rank 0.
    """
    import torch

    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, dict(values))
    for rank, rank_values in enumerate(by_rank):
        for key in sorted(by_rank[0].keys() | rank_values.keys()):
            expected, actual = by_rank[0].get(key), rank_values.get(key)
            if actual != expected:
                fault = f"has {key} = {actual!r} and rank 0 has {expected!r}"
                raise UserError(f"rank {rank}", fault, "start every rank with the same config, data and packages")


def leave_process_group() -> None:
    """Leaves the process group; close every engine first."""
    import torch

    torch.distributed.destroy_process_group()


def from_main_rank(value: Any) -> Any:
    """Returns rank 0's value on every rank; for small objects."""
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def on_gpu() -> bool:
    """Returns whether DeepSpeed runs on GPUs in this process."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() != "cpu"


def is_lost_peer(error: Exception) -> bool:
    """Returns whether a collective failed because another rank is gone or did not answer in time."""
    import torch

    # gloo raises a plain RuntimeError, whose text names its source file or its timeout.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "Timed out waiting" in str(error)
