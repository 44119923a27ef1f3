"""The projection that connectors, per-layer projections and flamingo blocks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
        h_NI = self.input(x_NW)
        if torch.is_grad_enabled() and h_NI.requires_grad:
            # Recomputation stops as soon as the activation is there again: the matrix product is not repeated.
            return checkpoint(self._finish, h_NI, use_reentrant=False, preserve_rng_state=False)
        return self._finish(h_NI)

    def _finish(self, h_NI: Tensor) -> Tensor:
        return self.output(F.gelu(h_NI))
