"""The process group: how ranks find each other, on which device, and how a lost one shows."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from pipeline.distributed import Ranks, free_port


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
