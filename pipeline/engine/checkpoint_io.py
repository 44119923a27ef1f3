"""State of an engine outside the engine: snapshots in host memory, checksums, resharding, trained weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.ds_config import zero_stage
from pipeline.engine.patches import without_recovery_scripts

if TYPE_CHECKING:
    import torch

STATE = "engine"  # folder of DeepSpeed's files inside a checkpoint
_CHECKSUM_CHUNK = 1 << 24  # elements; bounds the memory of a checksum
_CHECKSUM_PERIOD = 65_521  # the largest prime below 2^16


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint before it is written.

    Attributes:
        files: path -> content of each file.
    """

    files: dict[Path, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; the remaining content of the files is small."""
        import torch
        from torch.utils._pytree import tree_leaves

        tensors = {id(leaf): leaf for leaf in tree_leaves(list(self.files.values())) if isinstance(leaf, torch.Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def write(self) -> None:
        """Writes the files; may be called from any thread."""
        import torch

        for path, content in self.files.items():
            with path.open("wb") as file:  # given a path, torch reports a full disk without the system's reason
                torch.save(content, file)


@contextmanager
def collecting(engine: Any, *, copied: bool) -> Iterator[Snapshot]:
    """Yields a snapshot that receives what DeepSpeed's engine saves within the block, instead of the disk.

    Args:
        copied: copy tensors to host memory, so that training can continue before the files are written.
    """
    from pipeline.engine.collecting_engine import CollectingCheckpointEngine  # imports deepspeed

    snapshot = Snapshot({})
    default = engine.checkpoint_engine
    engine.checkpoint_engine = CollectingCheckpointEngine(snapshot.files, copied=copied)
    try:
        with without_recovery_scripts(engine):
            yield snapshot
    finally:
        engine.checkpoint_engine = default


def checksum(tensor: torch.Tensor, offset: int) -> int:
    """Returns a position-weighted sum over the bits of a tensor, modulo 2^64: parts of a tensor add up to the whole.

    Args:
        offset: index of the first element within the whole tensor.
    """
    import torch

    bits = tensor.detach().reshape(-1)
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), _CHECKSUM_CHUNK):
        chunk = bits[first : first + _CHECKSUM_CHUNK].to(torch.int64)
        index = torch.arange(offset + first, offset + first + len(chunk), device=bits.device)
        total += (chunk * (index % _CHECKSUM_PERIOD + 1)).sum()
    return int(total)


def start_resharding(checkpoint: Path, target: Path) -> subprocess.Popen[bytes]:
    """Starts converting a checkpoint into DeepSpeed's universal format, which any number of ranks can load.

    Frozen parameters are in neither: they come from the language model.

    Args:
        target: folder to create for the converted checkpoint.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / STATE), "--output_folder", str(target / STATE)]
    target.mkdir()
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the trained parameters of a checkpoint by name, in fp32; needs no engine and no process group."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for file in (folder / STATE).glob("mp_rank_*_model_states.pt"):
        # Up to stage 1 the whole model is in one file, whose bf16 layout DeepSpeed's converter cannot read. Unpickling
        # is safe: we wrote the file, and its hash was verified.
        state = torch.load(file, map_location="cpu", weights_only=False)
        if zero_stage(state["ds_config"]) <= 1:
            return {name: tensor.float() for name, tensor in state["module"].items()}
    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=True)
