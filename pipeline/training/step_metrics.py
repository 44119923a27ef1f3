"""Measurements of one optimizer step: token counts, loss by task, FLOPs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.labels import IGNORE_INDEX
from pipeline.cost.flops import RowShape, training_flops
from pipeline.model import PalConfig
from pipeline.model.parameters import TrainableSet
from pipeline.training.batches import Batch


class TaskLosses:
    """Cross-entropy of answer tokens by task, on one rank."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._sums = torch.zeros(len(tasks), dtype=torch.float64)
        self._tokens = torch.zeros(len(tasks), dtype=torch.float64)

    def add(self, batch: Batch, token_losses: Tensor, target_tokens: Tensor) -> None:
        """Adds one micro-batch; waits for the device.

        Args:
            token_losses, target_tokens: see `PalOutput`.
        """
        task = self._task_of_token(batch)[target_tokens.cpu()]
        self._sums.index_add_(0, task, token_losses.cpu().double())
        self._tokens.index_add_(0, task, torch.ones(len(task), dtype=torch.float64))

    def _task_of_token(self, batch: Batch) -> Tensor:
        """Returns (B * T,) the task index of each token; tokens that several questions share carry no loss."""
        segment_BT = batch["segment_ids"]
        questions = segment_BT.amax(1).clamp(min=1)  # in each row
        first = questions.cumsum(0) - questions
        task = torch.tensor([self._tasks.index(name) for name in batch["tasks"]])
        return task[first[:, None] + (segment_BT - 1).clamp(min=0)].flatten()

    def to_list(self) -> list[float]:
        """Returns losses, then token counts, to be added up over ranks."""
        return [*self._sums.tolist(), *self._tokens.tolist()]

    def metrics(self, totals: Sequence[float]) -> dict[str, float]:
        """Returns `loss/<task>` for every task of the step, from the sums of `to_list` over ranks."""
        pairs = zip(self._tasks, totals, totals[len(self._tasks) :], strict=False)
        # MLflow refuses other characters.
        return {f"loss/{re.sub(r'[^A-Za-z0-9_ .-]', '_', task)}": loss / n for task, loss, n in pairs if n}


def step_flops(config: PalConfig, batches: Sequence[Batch], trainable: TrainableSet) -> int:
    """Returns the FLOPs of one rank's micro-batches, forward and backward; see `training_flops`."""
    return sum(training_flops(config, row, trainable) for batch in batches for row in _row_shapes(config, batch))


def _row_shapes(config: PalConfig, batch: Batch) -> list[RowShape]:
    clips = zip(*(lengths.tolist() for lengths in batch["audio_lengths"].values()), strict=True)
    loss_tokens = (batch["labels"] != IGNORE_INDEX).sum(1).tolist()
    rows = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids, segments = batch["input_ids"][row, mask], batch["segment_ids"][row, mask]
        clip = (ids == config.audio_token_id).nonzero()
        system = int(clip[0]) if len(clip) else 0
        frames = dict(zip(batch["audio_lengths"], next(clips), strict=True)) if len(clip) else {}
        packed = torch.bincount(segments)[1:].tolist()
        questions = packed or [len(ids) - system - len(clip)]
        rows.append(RowShape(system, questions, loss_tokens[row], frames))
    return rows
