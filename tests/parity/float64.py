"""float64 all the way through a transformers model: its RMSNorm, rotary embedding and eager softmax ask for float32
whatever the model's type. In `lifted_to_float64` those requests are answered with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


def _answered_with_float64(function: Callable) -> Callable:
    def lift(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(lift, args), **{name: lift(value) for name, value in kwargs.items()})

    return call


@contextmanager
def lifted_to_float64() -> Iterator[None]:
    """Models built, and run forward and backward, inside compute nothing in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        # Not a TorchFunctionMode: a backward pass leaves that mode, and some of the model is recompute in it.
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
            for owner, name in ((torch.Tensor, "to"), (torch, "arange"), (torch.nn.functional, "softmax")):
                stack.enter_context(patch.object(owner, name, _answered_with_float64(getattr(owner, name))))
            yield
    finally:
        torch.set_default_dtype(torch.float32)
