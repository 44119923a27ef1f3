"""What DeepSpeed writes into a checkpoint, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATE = "engine"  # folder of DeepSpeed's files inside a checkpoint


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained parameters by name from what `Engine.save` wrote, in fp32, without an engine or a process group."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list((folder / STATE).glob("*optim_states.pt")):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=True)
    # Without ZeRO there are no partitions to put together. The file is our own: its hash was verified before.
    (file,) = (folder / STATE).glob("mp_rank_*_model_states.pt")
    return {k: v.float() for k, v in torch.load(file, map_location="cpu", weights_only=False)["module"].items()}
