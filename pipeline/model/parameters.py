"""Chooses which parameters are trained, and counts them."""

from __future__ import annotations

from typing import Literal

from torch import nn

TrainableSet = Literal["connector", "all_but_ffn", "all"]


def set_trainable(model: nn.Module, trainable: TrainableSet) -> None:
    """Freezes every parameter that is not trained.

    Args:
        model: a `PalForCausalLM`.
        trainable: `connector` (the whole audio side, the language model frozen), `all_but_ffn` (the language model's
            feed-forward layers frozen, the ablation of arXiv 2506.10423 v3, table 9) or `all`. Adapters (LoRA) are
            always trained.
    """
    for name, parameter in model.named_parameters():
        audio = name.startswith("streams.") or ".lora_" in name
        ffn = not audio and ".mlp." in name
        parameter.requires_grad_(audio or trainable == "all" or (trainable == "all_but_ffn" and not ffn))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts `total` and `trainable` parameters; partitioned ones (ZeRO-3) with all their elements."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, grad in sizes if grad)}
