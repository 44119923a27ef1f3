"""Deep copies of nested state in host memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def copy_to_host(content: Any) -> Any:
    """Returns a deep copy of nested dicts, lists and tuples whose tensors are on the CPU."""
    import torch

    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copied(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            view = (item.data_ptr(), item.dtype, item.shape, item.stride())
            if view not in copies:  # the two names of a tied weight stay one tensor
                copies[view] = item.detach().to("cpu", copy=True)
            return copies[view]
        if isinstance(item, dict):
            mapping = copy.copy(item)
            mapping.update({key: copied(value) for key, value in item.items()})
            return mapping
        if type(item) in (list, tuple):  # not torch.Size, which is a tuple too
            return type(item)(map(copied, item))
        return copy.deepcopy(item)

    return copied(content)
