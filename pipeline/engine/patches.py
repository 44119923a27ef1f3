"""Every use of a library's private members: what the public API of DeepSpeed and torch does not offer.

Each function names the version in which it was found necessary; `tests/engine/test_patches.py` fails as soon as the
library no longer needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.host_copy import copy_to_host

if TYPE_CHECKING:
    import torch


def skip_shm_all_reduce() -> None:
    """Keeps DeepSpeed's CPU backend from compiling its shared-memory all-reduce. DeepSpeed 0.19.8.

    Only its inference uses that operator; compiling it takes 20 s, and it holds 69 MB of /dev/shm for each rank. No
    setting turns it off.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def listen_on_loopback(address: str) -> None:
    """Keeps the rendezvous store of a job on one machine from listening on every network of that machine. torch 2.14.

    Whoever can reach the store can change it, and torch binds it to all addresses, whatever MASTER_ADDR is. A store can
    be given a socket that listens already, but not through `init_process_group`.

    Args:
        address: MASTER_ADDR; no effect unless it is the loopback address.
    """
    from torch.distributed import TCPStore

    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # an attribute of that name may be a function

    def store(*, host_name: str, port: int, is_master: bool, **options: Any) -> TCPStore:
        if is_master and host_name == address and port:
            with contextlib.suppress(OSError):  # the port is taken: torch reuses its own store there, or reports it
                listener = socket.create_server((host_name, port), backlog=1024)
                options["master_listen_fd"] = listener.detach()  # the store closes it
        return TCPStore(host_name=host_name, port=port, is_master=is_master, **options)

    if address in ("127.0.0.1", "localhost"):
        rendezvous.TCPStore = store  # type: ignore[attr-defined]


def set_group_timeouts(timeout_s: float) -> None:
    """Makes the collectives of every process group raise after this time; call it once the engine exists. torch 2.14.

    DeepSpeed creates its own groups, which do not inherit the timeout of the default group: a hung rank would hold all
    others for torch's 30 minutes. torch has no public list of the groups; `set_timeout` is public from 2.14 on.
    """
    import torch
    from torch.distributed import distributed_c10d

    set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


@contextmanager
def without_recovery_scripts(engine: Any) -> Iterator[None]:
    """Keeps DeepSpeed from copying its recovery scripts into a checkpoint. DeepSpeed 0.19.8.

    Rank 0 alone copies them between two barriers: on a full disk it would raise there while the other ranks wait. Every
    installation of DeepSpeed has the scripts, and no setting leaves them out.
    """
    engine._copy_recovery_script = lambda _: None  # on this instance; the class keeps its method
    try:
        yield
    finally:
        del engine._copy_recovery_script


def set_universal(engine: Any, universal: bool) -> None:
    """Sets whether the next checkpoint that the engine loads is a universal one. DeepSpeed 0.19.8.

    DeepSpeed reads this from its config when the engine is created (`checkpoint.load_universal`), but it is a property
    of a checkpoint, which is found and converted by ranks that have an engine already. `load_checkpoint` has no
    argument for it.
    """
    engine._config.load_universal_checkpoint = universal


@contextmanager
def local_partition(parameter: Any) -> Iterator[torch.Tensor]:
    """Yields this rank's partition of a parameter under ZeRO-3, read from NVMe where it is swapped. DeepSpeed 0.19.8.

    DeepSpeed's public functions (`safe_get_local_fp32_param`) give the optimizer's fp32 copies, which frozen parameters
    do not have.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    swapped = parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor
    finally:
        if swapped:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def restore_swapped_optimizer(engine: Any, folder: Path, tag: str) -> None:
    """Restores optimizer state that DeepSpeed does not load under NVMe offload. DeepSpeed 0.19.8.

    `load_checkpoint` then copies the swap files back and nothing else: Adam's states, and whole groups of parameters
    that are too small to be swapped, stay as they were initialized.
    """
    import torch

    optimizer, rank = engine.optimizer, torch.distributed.get_rank()
    optimizer.checkpoint_event_prologue()  # drops the full copies of the smallest parameters that every rank keeps
    saved = engine._get_all_zero_checkpoints(str(folder), tag)[rank]
    states, masters = saved["optimizer_state_dict"]["state"], saved["fp32_flat_groups"]
    for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = copy_to_host(states[group])
        optimizer.optimizer.state[master] = state
        if optimizer._swappable_optimizer_subgroup(group):
            size = optimizer.fp16_partitioned_groups_flat_numel[group]
            state.update({name: torch.zeros(size) for name, value in state.items() if torch.is_tensor(value)})
            # The first swap-in registers the states with the swapper, which reads them from their files.
            optimizer._optimizer_states_and_gradient_swap_in(group)
            optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            master.data.copy_(masters[group])
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # gathers the full copies again
