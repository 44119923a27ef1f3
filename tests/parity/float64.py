"""Runs a transformers model in float64 throughout: its RMSNorm, rotary embedding and eager softmax convert to float32
whatever the model's dtype. Inside `lifted_to_float64` they convert to float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


def _with_float64(function: Callable) -> Callable:
    def lift(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(lift, args), **{name: lift(value) for name, value in kwargs.items()})

    return call


@contextmanager
def lifted_to_float64() -> Iterator[None]:
    """Ensures that models built and run inside, forward and backward, compute nothing in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        # Not a TorchFunctionMode: the backward pass leaves that mode, and recomputes some of the model.
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
            for owner, name in ((torch.Tensor, "to"), (torch, "arange"), (torch.nn.functional, "softmax")):
                stack.enter_context(patch.object(owner, name, _with_float64(getattr(owner, name))))
            yield
    finally:
        torch.set_default_dtype(torch.float32)
