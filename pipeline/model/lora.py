"""Low-rank adapters (LoRA) on the language model, by `peft`, which is imported when adapters are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from pipeline.core.errors import UserError


class AdaptableModel(Protocol):
    """A model whose language model can have adapters; its config records them as `lora`."""

    config: Any
    language_model: Any


def adapt(language_model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Injects adapters into a language model, in place, and freezes everything else in it.

    Args:
        lora: `rank`, `alpha`, `dropout` and `target_modules` (names of linear layers, such as `q_proj`).

    Raises:
        UserError: peft is absent, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("train.lora", "needs the package peft", "install it, or remove train.lora") from error
    settings = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["target_modules"]),
    )
    try:
        inject_adapter_in_model(settings, language_model)
    except ValueError as error:
        names = ", ".join(lora["target_modules"])
        raise UserError("train.lora.target_modules", f"no layer is named {names}", "name linear layers") from error


def add_lora(
    model: AdaptableModel,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> None:
    """Gives a model adapters and records them in its config, so that `from_pretrained` builds them again.

    Raises:
        UserError: see `adapt`.
    """
    lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "target_modules": list(target_modules)}
    adapt(model.language_model, lora)
    model.config.lora = lora


def lora_parameters(model: AdaptableModel) -> list[nn.Parameter]:
    """Returns the parameters of the adapters and the weights that they adapt."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.language_model.modules() if isinstance(module, LoraLayer)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def merge_lora(model: AdaptableModel) -> None:
    """Merges the adapters into the weights that they adapt and removes them, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.language_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.language_model.get_submodule(parent), child, module.get_base_layer())
    model.config.lora = None
