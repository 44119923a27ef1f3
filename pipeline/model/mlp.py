"""The projection that connectors, per-layer projections and flamingo blocks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.recompute import recomputed


class Mlp(nn.Module):
    """Linear-GELU-Linear; the activation is computed again in the backward pass instead of being kept.

    Args:
        inner: width between the two; None means `width_out`.
    """

    def __init__(self, width: int, width_out: int, *, inner: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.input = nn.Linear(width, inner or width_out, bias=bias)
        self.output = nn.Linear(inner or width_out, width_out, bias=bias)

    def forward(self, x_NW: Tensor) -> Tensor:
        # Recomputation stops as soon as the activation is there again: the matrix product is not repeated.
        return recomputed(self.finish, self.input(x_NW))

    def finish(self, h_NI: Tensor) -> Tensor:
        """What follows `input`."""
        return self.output(F.gelu(h_NI))
