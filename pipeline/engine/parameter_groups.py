"""Groups of parameters that the optimizer treats alike: by peak learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    parameters: Sequence[torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def parameter_groups(model: torch.nn.Module, train: TrainConfig) -> list[ParameterGroup]:
    """Groups trained parameters by rate (streams, language model) and decay (matrices; never norms and biases)."""
    groups = []
    rates = {"streams": train.connector_learning_rate or train.learning_rate, "language_model": train.learning_rate}
    for side, rate in rates.items():
        trained = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(f"{side}.")]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups.append(ParameterGroup(f"{side}.matrices", matrices, rate, train.weight_decay))
        groups.append(ParameterGroup(f"{side}.vectors", vectors, rate, 0.0))
    return groups
