"""What an engine holds, apart from the engine: copies in host memory, files, checksums, other numbers of ranks."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.ds_config import zero_stage

if TYPE_CHECKING:
    import torch

STATE = "engine"  # folder of DeepSpeed's files inside a checkpoint
_CHECKSUM_CHUNK = 1 << 24  # elements; bounds the memory of a checksum
_CHECKSUM_PERIOD = 65_521


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint: files that are still to be written, and their contents."""

    files: dict[Path, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; what else is in the files is small."""
        import torch
        from torch.utils._pytree import tree_leaves

        tensors = {id(leaf): leaf for leaf in tree_leaves(list(self.files.values())) if isinstance(leaf, torch.Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def write(self) -> None:
        """Writes the files, from any thread."""
        import torch

        for path, content in self.files.items():
            with path.open("wb") as file:  # given a path, torch reports a full disk without the system's reason
                torch.save(content, file)


@contextmanager
def collecting(engine: Any, *, copied: bool) -> Iterator[Snapshot]:
    """What DeepSpeed's engine would write in here. Its script for recovery is left out: it comes with every DeepSpeed.

    Args:
        copied: to host memory, so that training can go on before the files are written.
    """
    snapshot = Snapshot({})

    def collect(state_dict: Any, path: str) -> None:
        snapshot.files[Path(path)] = _copy_to_host(state_dict) if copied else state_dict

    # Of these objects alone, in front of the methods of their classes.
    engine.checkpoint_engine.save, engine._copy_recovery_script = collect, lambda _: None
    try:
        yield snapshot
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script


def _copy_to_host(content: Any) -> Any:
    import torch

    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copied(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            place = (item.data_ptr(), item.dtype, item.shape, item.stride())
            if place not in copies:  # the two names of a tied weight stay one tensor
                copies[place] = item.detach().to("cpu", copy=True)
            return copies[place]
        if isinstance(item, dict):
            mapping = copy.copy(item)
            mapping.update({key: copied(value) for key, value in item.items()})
            return mapping
        if type(item) in (list, tuple):  # not torch.Size, which is a tuple too
            return type(item)(map(copied, item))
        return copy.deepcopy(item)

    return copied(content)


@contextmanager
def local_part(parameter: Any) -> Iterator[torch.Tensor]:
    """This rank's part of a parameter under ZeRO-3, read from NVMe for as long as it is needed."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    swapped = parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor
    finally:
        if swapped:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def restore_swapped_optimizer(engine: Any, folder: Path) -> None:
    """Restores what DeepSpeed 0.19 forgets of a checkpoint under NVMe offload, where it copies the swap files back and
    nothing else: Adam's states, and whole groups of parameters that are too small to be swapped."""
    import torch

    optimizer, rank = engine.optimizer, torch.distributed.get_rank()
    optimizer.checkpoint_event_prologue()  # drops the whole copies that every rank keeps of the smallest parameters
    saved = engine._get_all_zero_checkpoints(str(folder), STATE)[rank]
    states, masters = saved["optimizer_state_dict"]["state"], saved["fp32_flat_groups"]
    for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = _copy_to_host(states[group])
        optimizer.optimizer.state[master] = state
        if optimizer._swappable_optimizer_subgroup(group):
            size = optimizer.fp16_partitioned_groups_flat_numel[group]
            state.update({name: torch.zeros(size) for name, value in state.items() if torch.is_tensor(value)})
            # Swapped in for the first time, the states become known to the swapper and are read from their files.
            optimizer._optimizer_states_and_gradient_swap_in(group)
            optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            master.data.copy_(masters[group])
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # and makes them again


def checksum(tensor: torch.Tensor, offset: int) -> int:
    """A sum over the bits of a tensor and their places, so that parts of a tensor add up to the whole, modulo 2^64.

    Args:
        offset: place of the first element within the whole.
    """
    import torch

    bits = tensor.detach().reshape(-1)
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), _CHECKSUM_CHUNK):
        chunk = bits[first : first + _CHECKSUM_CHUNK].to(torch.int64)
        place = torch.arange(offset + first, offset + first + len(chunk), device=bits.device)
        total += (chunk * (place % _CHECKSUM_PERIOD + 1)).sum()
    return int(total)


def start_resharding(checkpoint: Path, target: Path) -> subprocess.Popen[bytes]:
    """Begins to convert what a checkpoint holds into DeepSpeed's universal form, which any number of ranks can load.

    Frozen parameters are in neither: they come from the language model.

    Args:
        target: a new folder.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / STATE), "--output_folder", str(target / STATE)]
    target.mkdir()
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained parameters by name from what `Engine.snapshot` wrote, in fp32, without an engine or a process group."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for file in (folder / STATE).glob("mp_rank_*_model_states.pt"):
        # Up to stage 1 the model is whole in one file, and what bf16 adds to it DeepSpeed's converter cannot read. The
        # file is our own: its hash was verified before.
        state = torch.load(file, map_location="cpu", weights_only=False)
        if zero_stage(state["ds_config"]) <= 1:
            return {name: tensor.float() for name, tensor in state["module"].items()}
    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=True)
