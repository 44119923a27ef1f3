"""A stand-in for a GPU: parameters and features without memory, real host tensors, and a record of waits.

`device_model` moves a model to `cuda:0` as fake tensors (shapes and devices, no numbers), or to `meta` for the backward
pass, which needs a driver on `cuda:0`. Inside a `DeviceRecorder` host tensors stay real, and each operation that waits
for the device, or mixes tensors of host and device, is recorded with the line of `pipeline` that issued it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.model import PalForCausalLM, attention_ops, mask
from tests.helpers.small_models import Batch

DeviceName = Literal["cuda:0", "meta"]
PRODUCT = str(Path(__file__).resolve().parents[2] / "pipeline")
# Their outputs have a size, or are host values, that only the device knows.
WAITING = {
    "_local_scalar_dense": lambda _: 1,
    "equal": lambda _: True,
    "is_nonzero": lambda _: True,
    "nonzero": lambda x: x.new_empty((1, x.ndim), dtype=torch.long),
    "masked_select": lambda x: x.new_empty(1),
    "_unique2": lambda x: (x.new_empty(1), x.new_empty(0, dtype=torch.long), x.new_empty(0, dtype=torch.long)),
    "bincount": lambda x: x.new_empty(1, dtype=torch.long),
    "repeat_interleave": lambda x: x.new_empty(1, dtype=torch.long),
}
# They start no kernel, and no schema says so: allocations, and views that autograd or reshape make.
NO_KERNEL = {
    "device",
    "detach",
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "lift_fresh",
    "alias",
}


@torch.library.custom_op("pal_stand_in::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("pal_stand_in::attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_attention.register_fake(lambda query, key, value, mask: torch.empty_like(query))
_attention_backward.register_fake(
    lambda gradient, query, key, value, mask: (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
)
_attention.register_autograd(
    lambda ctx, gradient: (*_attention_backward(gradient, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@dataclass(frozen=True)
class Finding:
    """An operation that would cost time on a GPU.

    Attributes:
        kind: `wait`, the host waits for the device; `mix`, host and device tensors in one operation.
        operation: name of the operation in torch's dispatcher.
        place: file and line of `pipeline` that issued it.
    """

    kind: Literal["wait", "mix"]
    operation: str
    place: str


class DeviceRecorder(TorchDispatchMode):
    """Records waits, mixes and kernels of the operations on one device, and runs host operations as they are.

    Attributes:
        findings: waits and mixes, in order.
        kernels: number of operations with a kernel, by name: no views, no allocations.
    """

    def __init__(self, device: DeviceName) -> None:
        super().__init__()
        self.device_type = torch.device(device).type
        self.findings: list[Finding] = []
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.device.type == self.device_type]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not on_device and target != self.device_type:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        on_host = [x for x in tensors if x.device.type == "cpu"]
        if name in WAITING:
            self._record("wait", name)
            return WAITING[name](on_device[0])
        if name == "_to_copy" and on_device and target == "cpu":
            self._record("wait", name)
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in ("_to_copy", "copy_") and on_host:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            pinned = non_blocking and getattr(on_host[0], "is_pinned_here", False)
            if self.device_type == "cuda" and on_host[0].numel() and not pinned:
                self._record("wait", name)
        elif any(x.ndim or name in ("index", "index_put_") for x in on_host):
            self._record("mix", name)
        if name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in _indices(name, args)):
            self._record("wait", name)
            return self._like_selection(name, args)
        if not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return func(*args, **kwargs)  # in the fake mode, which lies below this one, on `cuda:0`

    def _like_selection(self, name: str, args: Any) -> Tensor:
        return args[0] if name != "index" else args[0].new_empty(1, *args[0].shape[args[1][0].ndim :])

    def _record(self, kind: Literal["wait", "mix"], operation: str) -> None:
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(PRODUCT):
            frame = frame.f_back  # type: ignore[assignment]
        place = "outside pipeline" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
        self.findings.append(Finding(kind, operation, place))


def _indices(name: str, args: Any) -> list[Tensor]:
    return [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []


def device_model(model: PalForCausalLM, device: DeviceName) -> FakeTensorMode:
    """Replaces the parameters and buffers of a model by ones without memory on the device; returns their mode."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = nn.Parameter(_empty_on(parameter, device, fake), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _empty_on(buffer, device, fake)
        for name in ("original_inv_freq",):
            if isinstance(vars(module).get(name), Tensor):
                setattr(module, name, _empty_on(getattr(module, name), device, fake))
    model.tie_weights()
    return fake


def device_arguments(batch: Batch, device: DeviceName, fake: FakeTensorMode, *, labels: bool = True) -> dict[str, Any]:
    """Returns the model's arguments: features on the device, everything else in host memory, as the loader does."""
    arguments = batch.arguments(labels=labels)
    arguments["audio_features"] = tree_map(lambda x: _empty_on(x, device, fake), arguments["audio_features"])
    return arguments


def _empty_on(value: Tensor, device: DeviceName, fake: FakeTensorMode) -> Tensor:
    if device == "meta":
        return torch.empty_like(value, device="meta")
    with fake:
        return torch.empty(value.shape, dtype=value.dtype, device=device)


@contextmanager
def device_stand_in(device: DeviceName, fake: FakeTensorMode) -> Iterator[DeviceRecorder]:
    """Enters a recorder; what needs a driver is replaced: pinning, generator states, the kernels of attention."""

    def pin(value: Tensor) -> Tensor:
        pinned = value.clone()
        pinned.is_pinned_here = True  # type: ignore[attr-defined]
        return pinned

    def flex(query: Tensor, joined: Any, *_: Any) -> Tensor:
        return _attention(query, *joined, None)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any) -> Tensor:
        return _attention(query, key, value, attn_mask)

    mode = fake if device == "cuda:0" else nullcontext()
    with pytest.MonkeyPatch.context() as patch, mode, DeviceRecorder(device) as recorder:
        patch.setattr(Tensor, "pin_memory", pin)
        patch.setattr(attention_ops, "_flex", flex)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)  # one kernel, as on a GPU
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no device `meta`
        patch.setattr(mask, "compiled_create_block_mask", lambda: create_block_mask)
        patch.setattr(torch.utils.checkpoint, "_infer_device_type", lambda *_: "cpu")
        yield recorder
