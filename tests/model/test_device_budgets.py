"""Budgets of a training step: operations that start a kernel, and equal indices in succession in gathers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.fake_cuda import device_arguments, device_model, device_stand_in
from tests.helpers.small_models import AUDIO_TOKEN, PRESETS, batch, build

A = AUDIO_TOKEN
# Kernels of a step with audio of equal length, forward and backward, over those of PLITS: as counted, not as wished.
KERNELS_OVER_PLITS = {"lal": 2.05, "pal_v2": 2.1, "pal_v3": 1.45, "flamingo": 1.55}
LONGEST_RUN = 8


def count_kernels(preset: str) -> int:
    model = build(preset).train()  # type: ignore[arg-type]
    fake = device_model(model, "meta")
    rows = batch([[5, 6, A, 7, 8, 9, 10]] * 4, [6] * 4)
    with device_stand_in("meta", fake) as recorder:
        model(**device_arguments(rows, "meta", fake)).loss.backward()
    return recorder.kernels.total()


def test_a_step_starts_no_more_kernels_than_its_budget() -> None:
    baseline = count_kernels("plits")
    ratios = {preset: count_kernels(preset) / baseline for preset in KERNELS_OVER_PLITS}
    assert all(ratio <= KERNELS_OVER_PLITS[preset] for preset, ratio in ratios.items()), ratios


class GatherRuns(TorchDispatchMode):
    """Records the longest run of equal indices of every gather."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self.gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.index and args[0].is_floating_point():
            for index in (x for x in args[1] if x is not None):
                assert index.dtype == torch.long
                self.gathers += 1
                self.longest = max(self.longest, longest_run(index.flatten()))
        return func(*args, **(kwargs or {}))


def longest_run(index: Tensor) -> int:
    return int(torch.unique_consecutive(index, return_counts=True)[1].max()) if len(index) else 0


def test_the_longest_run_is_counted() -> None:
    assert longest_run(torch.tensor([1, 0, 0, 0, 2, 2])) == 3


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_padding_repeats_no_index_in_gathers(preset: str, packed: bool) -> None:
    model = build(preset).train()  # type: ignore[arg-type]
    rows = batch([[5, 6, A, 7, 8, *range(9, 40)], [5, A, 6, 7, 8, 9]], [60, 3])
    if packed:
        rows.segment_ids = torch.zeros_like(rows.input_ids)
        rows.segment_ids[0, 3:6], rows.segment_ids[0, 6:] = 1, 2  # three tokens, and thirty
        rows.segment_ids[1, 2:4], rows.segment_ids[1, 4:6] = 1, 2
    with GatherRuns() as runs:
        model(**rows.arguments()).loss.backward()
    assert runs.gathers
    assert runs.longest <= LONGEST_RUN
