"""The process group: how ranks find each other, on which device, and how a lost one shows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks, free_port
from pipeline.engine.ds_config import zero_stage

if TYPE_CHECKING:
    import torch


def init_process_group(ranks: Ranks, timeout_s: float) -> None:
    """Joins the process group: gloo on CPU, NCCL on GPUs.

    A collective that waits longer than `timeout_s` for another rank raises instead of hanging.
    """
    import deepspeed
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed would compile an all-reduce that only its inference uses (20 s, and 69 MB of /dev/shm a rank).
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "MASTER_ADDR" not in os.environ:  # started without a launcher: a group of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    get_accelerator().set_device(ranks.local_rank)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)


@contextmanager
def partitioned_loading(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Under ZeRO-3 cuts up what transformers loads in here weight by weight, so that no rank ever holds all of it."""
    if zero_stage(ds_config) < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept_alive = HfDeepSpeedConfig(dict(ds_config))  # transformers itself keeps a weak reference
    try:
        yield
    finally:
        del kept_alive
        unset_hf_deepspeed_config()


def gathered(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """Has these parameters whole in here, and keeps what rank 0 makes of them; nothing to do but under ZeRO-3."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def require_same_everywhere(values: Mapping[str, Any]) -> None:
    """Compares settings over all ranks, before a difference can hang or bend a run.

    Raises:
        UserError: a rank has another one.
    """
    import torch

    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, dict(values))
    for rank, other in enumerate(gathered):
        for key in sorted(gathered[0].keys() | other.keys()):
            here, there = gathered[0].get(key), other.get(key)
            if here != there:
                fault = f"has {key} = {there!r} and rank 0 has {here!r}"
                raise UserError(f"rank {rank}", fault, "start every rank with the same config, data and packages")


def limit_waiting(timeout_s: float) -> None:
    """Has the collectives of every group raise after waiting this long; to be called once the engine is there.

    DeepSpeed makes groups of its own, which do not take over the limit of the first one: a hung rank would hold all
    others for torch's half an hour.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)  # torch 2.14 has a public name for it


def leave_process_group() -> None:
    """Leaves the process group, in which no engine is at work any more."""
    import torch

    torch.distributed.destroy_process_group()


def from_main_rank(value: Any) -> Any:
    """A small object of rank 0, on every rank."""
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def on_gpu() -> bool:
    """Whether DeepSpeed runs on a GPU here."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() != "cpu"


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or did not answer in time."""
    import torch

    # gloo raises a plain RuntimeError, whose text names its source file or its timeout.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "Timed out waiting" in str(error)
