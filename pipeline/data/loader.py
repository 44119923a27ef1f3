"""Batches for training and evaluation: the order of `order.py`, carried out by torch's DataLoader and its workers."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config import DataConfig
from pipeline.data.chat import Chat
from pipeline.data.collate import Batch, Example, collate
from pipeline.data.order import Ints, Mixture, Order, Visit, VisitOrder, micro_batches
from pipeline.data.shards import FeatureSet, open_mixture
from pipeline.distributed import read_ranks
from pipeline.errors import UserError

_PREFETCHED_BATCHES = 4  # per worker
_PREFETCHED_VISITS = 256  # at a time, from a far feature set
_PREFETCH_PAUSE_S = 0.2


class TrainingLoader:
    """This rank's micro-batches, without end; resumes at any number of ranks.

    Args:
        features: the set of `data.train`; those of `data.mixture` are opened here.
        chat: writes the conversations.
        data: selection, mixture, packing, shuffling and workers.
        seed: of the order.
        visits_per_step: rows of a global batch, over all ranks.
        micro_batch_size: rows of one batch.
        feature_dtype: of the audio features.

    Raises:
        UserError: unknown task or dataset, nothing selected, a mixed set that cannot be read or has other features, a
            global batch that does not divide.
    """

    def __init__(
        self,
        features: FeatureSet,
        chat: Chat,
        data: DataConfig,
        *,
        seed: int,
        visits_per_step: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        feature_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._sets = [features, *open_mixture(features, data)]
        selections = [features.table.select(data.tasks, data.datasets)]
        for number, (this, other) in enumerate(zip(self._sets[1:], data.mixture, strict=True)):
            selections.append(this.table.select(other.tasks, other.datasets, f"data.mixture.{number}"))
        orders = [
            VisitOrder(
                this.table.clip,
                selected,
                this.shard_sizes,
                questions_per_sequence=data.questions_per_sequence,
                block_clips=data.shuffle_block_clips,
                seed=seed,
            )
            for this, selected in zip(self._sets, selections, strict=True)
        ]
        shares = [other.share for other in data.mixture]
        self.order: Order = Mixture(orders, shares, seed) if shares else orders[0]
        sizes = [this.shard_sizes for this in self._sets]
        settings = f"{data.questions_per_sequence} {data.shuffle_block_clips} {seed} {sizes} {shares}"
        choice = b" ".join(selected.tobytes() for selected in selections)
        self._fingerprint = hashlib.sha256(settings.encode() + choice).hexdigest()[:16]
        self._data = data
        self._examples = _Rows(self._sets, chat, feature_dtype)
        self._visits_per_step = visits_per_step
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._batches_per_step, rest = divmod(visits_per_step, micro_batch_size * world_size)
        if rest:
            raise UserError(
                "train.global_batch_size",
                f"{visits_per_step} sequences do not divide into {micro_batch_size} x {world_size} ranks",
                f"use a multiple of {micro_batch_size * world_size} sequences",
            )
        self._start = 0  # visits consumed before the current iterator
        self._yielded = 0  # batches since

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every selected question of `data.train` is seen once."""
        return self.order.visits_per_epoch / self._visits_per_step

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from the loaded state; a second iterator goes on from the last complete step."""
        self._start, self._yielded = self._visits_consumed, 0
        plan = micro_batches(
            self.order,
            self._length_of,
            start=self._start,
            visits_per_step=self._visits_per_step,
            micro_batch_size=self._micro_batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )
        stopped = threading.Event()
        if any(this.is_cached for this in self._sets):
            threading.Thread(target=self._prefetch, args=(self._start, stopped), daemon=True).start()
        try:
            for batch in _load(self._examples, plan, self._data.workers):
                self._yielded += 1
                yield batch
        finally:
            stopped.set()

    def _prefetch(self, position: int, stopped: threading.Event) -> None:
        """Downloads the shards that are read next, a quarter of a block ahead; each rank of a node its share."""
        order = copy.deepcopy(self.order)  # remembers epochs of its own
        ranks = read_ranks()
        while not stopped.is_set():
            if position >= self._visits_consumed + self._data.shuffle_block_clips // 4:
                stopped.wait(_PREFETCH_PAUSE_S)
                continue
            for visit in order.visits(position, position + _PREFETCHED_VISITS):
                try:
                    self._sets[visit.source].prefetch(visit.clip, ranks.local_rank, ranks.local_world_size)
                except UserError:
                    return  # the row that needs this shard says so
            position += _PREFETCHED_VISITS

    def _length_of(self, visit: Visit) -> float:
        # Characters: tokens would be exact, and known only after tokenising the whole corpus.
        return float(self._sets[visit.source].table.characters[visit.questions].sum())

    @property
    def _visits_consumed(self) -> int:
        return self._start + self._yielded // self._batches_per_step * self._visits_per_step

    def state_dict(self) -> dict[str, Any]:
        """Visits consumed by complete steps; the same on every rank, and not affected by what is prefetched."""
        return {"visits": self._visits_consumed, "order": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after that many visits.

        Raises:
            UserError: the state belongs to another order (set, selection, packing, shuffling or seed).
        """
        if state["order"] != self._fingerprint:
            raise UserError(
                "data",
                "is not the order of questions that the checkpoint was written with",
                "resume with the same feature set, tasks, datasets, questions_per_sequence, shuffle_block_clips, seed",
            )
        self._start, self._yielded = state["visits"], 0


def evaluation_batches(
    features: FeatureSet,
    chat: Chat,
    selected: Ints,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    feature_dtype: torch.dtype = torch.float32,
) -> Iterator[Batch]:
    """Each selected question once over all ranks, one a row, in storage order: for a validation loss.

    Every rank gets the same number of batches, so that collectives stay in step: a rank that runs out gets a row with
    a clip and no question, hence no label.
    """
    clip = features.table.clip
    rows = [Visit(int(clip[question]), np.array([question])) for question in selected[rank::world_size]]
    num_rows = -(-len(selected) // world_size)
    rows += [Visit(int(clip[selected[0]]), np.empty(0, np.int64))] * (num_rows - len(rows))
    plan = (rows[first : first + batch_size] for first in range(0, num_rows, batch_size))
    yield from _load(_Rows([features], chat, feature_dtype), plan, workers)


class _Rows(Dataset[Batch | UserError]):
    """Visits -> batch. A user's error is returned and not raised: torch rewrites the exceptions
    that cross from a worker."""

    def __init__(self, sets: Sequence[FeatureSet], chat: Chat, feature_dtype: torch.dtype) -> None:
        self._sets = sets
        self._chat = chat
        self._feature_dtype = feature_dtype

    def __getitem__(self, visits: Sequence[Visit]) -> Batch | UserError:
        try:
            return collate(
                [self._example(visit) for visit in visits],
                pad_token_id=self._chat.pad_token_id,
                widths=self._sets[0].widths,
                feature_dtype=self._feature_dtype,
            )
        except UserError as error:
            return error

    def _example(self, visit: Visit) -> Example:
        this = self._sets[visit.source]
        clip = this.clip(visit.clip)
        questions = [clip.questions[number] for number in this.table.number[visit.questions]]
        if this.is_text:
            return Example(self._chat.row(questions, audio=False), questions, None, {})
        return Example(self._chat.row(questions), questions, clip, this.features(visit.clip, clip.clip_id))


def _load(rows: _Rows, plan: Iterator[list[Visit]], workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        rows,
        sampler=plan,  # any iterable of indices; ours are whole micro-batches
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED_BATCHES if workers else None,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch
