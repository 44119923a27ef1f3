"""Computing again in the backward pass what would cost more to keep than to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, of which only the inputs are kept for the backward pass.

    Without reentrance: the reentrant form drops gradients of what the function reaches by other ways than its inputs.
    And without dropout: the state of the random numbers is not restored.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)
