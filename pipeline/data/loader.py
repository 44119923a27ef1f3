"""Batches for training and evaluation: the order of `order.py`, carried out by torch's DataLoader and its workers."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, tee
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config import DataConfig
from pipeline.core.errors import UserError
from pipeline.core.ranks import read_ranks
from pipeline.data.chat_template import Chat
from pipeline.data.collate import Batch, Example, collate
from pipeline.data.feature_set import FeatureSet, open_mixture
from pipeline.data.sampler import Ints, MixtureSampler, PackedExample, PackedSampler, Sampler, split_micro_batches

_PREFETCHED_BATCHES = 4  # per worker
_PREFETCHED_EXAMPLES = 256  # at a time, from a far feature set
_PREFETCH_PAUSE_S = 0.2


class TrainingLoader:
    """This rank's micro-batches, those of one optimizer step at a time, without end; resumes at any number of ranks.

    Args:
        features: the set of `data.train`; those of `data.mixture` are opened here.
        chat: writes the conversations.
        data: selection, mixture, packing, shuffling and workers.
        seed: of the order.
        examples_per_step: rows of a global batch, over all ranks.
        micro_batch_size: rows of one batch, at most.
        micro_batch_tokens: positions of one batch, padding included, at most; None for no such bound. Every text is
            tokenised once for it, which takes a minute or two for five million questions.
        audio_positions: seconds of a clip -> positions that its audio takes in the sequence, about.
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
        examples_per_step: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        micro_batch_tokens: int | None = None,
        audio_positions: Callable[[float], int] | None = None,
        feature_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._sets = [features, *open_mixture(features, data)]
        selections = [features.table.select(data.tasks, data.datasets)]
        for number, (this, other) in enumerate(zip(self._sets[1:], data.mixture, strict=True)):
            selections.append(this.table.select(other.tasks, other.datasets, f"data.mixture.{number}"))
        samplers = [
            PackedSampler(
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
        self.sampler: Sampler = MixtureSampler(samplers, shares, seed) if shares else samplers[0]
        sizes = [this.shard_sizes for this in self._sets]
        settings = f"{data.questions_per_sequence} {data.shuffle_block_clips} {seed} {sizes} {shares}"
        choice = b" ".join(selected.tobytes() for selected in selections)
        self._fingerprint = hashlib.sha256(settings.encode() + choice).hexdigest()[:16]
        self._data = data
        self._examples = _Rows(self._sets, chat, feature_dtype)
        self._examples_per_step = examples_per_step
        self._lengths = _Lengths(self._sets, chat, micro_batch_size, micro_batch_tokens, audio_positions)
        self._rank, self._world_size = rank, world_size
        per_pass = world_size if micro_batch_tokens else micro_batch_size * world_size
        if examples_per_step % per_pass:
            raise UserError(
                "train.global_batch_size",
                f"{examples_per_step} sequences do not divide into {per_pass // world_size} x {world_size} ranks",
                f"use a multiple of {per_pass} sequences",
            )
        self._start = 0  # packed examples consumed before the current iterator
        self._yielded = 0  # steps since

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every selected question of `data.train` is seen once."""
        return self.sampler.examples_per_epoch / self._examples_per_step

    @property
    def tasks(self) -> list[str]:
        """Tasks that questions of this loader may have."""
        return sorted({task for this in self._sets for task in this.table.tasks})

    def __iter__(self) -> Iterator[list[Batch]]:
        """Goes on from the loaded state; a second iterator goes on after the last step that was yielded."""
        self._start, self._yielded = self._examples_consumed, 0
        plan, counted = tee(self._plan(self._start))
        stopped = threading.Event()
        if any(this.is_cached for this in self._sets):
            threading.Thread(target=self._prefetch, args=(self._start, stopped), daemon=True).start()
        try:
            batches = _load(self._examples, chain.from_iterable(plan), self._data.workers)
            for step in counted:
                micro_batches = list(islice(batches, len(step)))
                self._yielded += 1
                yield micro_batches
        finally:
            stopped.set()

    def _plan(self, start: int) -> Iterator[list[list[PackedExample]]]:
        # A global batch holds the next packed examples whatever the number of ranks is; their order within it does not
        # change the loss.
        while True:
            packed_examples = self.sampler.packed_examples(start, start + self._examples_per_step)
            yield split_micro_batches(
                packed_examples, self._lengths.of, self._lengths.rows, rank=self._rank, world_size=self._world_size
            )
            start += self._examples_per_step

    def _prefetch(self, position: int, stopped: threading.Event) -> None:
        """Downloads the shards that are read next, a quarter of a block ahead; each rank of a node its share."""
        order = copy.deepcopy(self.sampler)  # remembers epochs of its own
        ranks = read_ranks()
        while not stopped.is_set():
            if position >= self._examples_consumed + self._data.shuffle_block_clips // 4:
                stopped.wait(_PREFETCH_PAUSE_S)
                continue
            for packed in order.packed_examples(position, position + _PREFETCHED_EXAMPLES):
                try:
                    self._sets[packed.source].prefetch(packed.clip, ranks.local_rank, ranks.local_world_size)
                except UserError:
                    return  # the row that needs this shard says so
            position += _PREFETCHED_EXAMPLES

    @property
    def _examples_consumed(self) -> int:
        return self._start + self._yielded * self._examples_per_step

    def state_dict(self) -> dict[str, Any]:
        """Visits consumed by complete steps; the same on every rank, and not affected by what is prefetched."""
        return {"packed_examples": self._examples_consumed, "order": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after that many packed examples.

        Raises:
            UserError: the state belongs to another order (set, selection, packing, shuffling or seed).
        """
        if state["order"] != self._fingerprint:
            raise UserError(
                "data",
                "is not the order of questions that the checkpoint was written with",
                "resume with the same feature set, tasks, datasets, questions_per_sequence, shuffle_block_clips, seed",
            )
        self._start, self._yielded = state["packed_examples"], 0


def evaluation_batches(
    features: FeatureSet,
    chat: Chat,
    selected: Ints,
    *,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    audio_positions: Callable[[float], int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    feature_dtype: torch.dtype = torch.float32,
) -> Iterator[Batch]:
    """Each selected question once over all ranks, one a row, longest first: for a validation loss.

    Every rank gets the same number of batches, so that collectives stay in step: a rank that runs out gets rows with
    a clip and no question, hence no label.

    Args:
        micro_batch_size, micro_batch_tokens, audio_positions: as of `TrainingLoader`.
    """
    clip = features.table.clip
    rows = [PackedExample(int(clip[question]), np.array([question])) for question in selected]
    rows += [PackedExample(int(clip[selected[0]]), np.empty(0, np.int64))] * (-len(rows) % world_size)
    lengths = _Lengths([features], chat, micro_batch_size, micro_batch_tokens, audio_positions)
    if micro_batch_tokens is not None:
        lengths.count(selected)
    plan = split_micro_batches(rows, lengths.of, lengths.rows, rank=rank, world_size=world_size)
    yield from _load(_Rows([features], chat, feature_dtype), iter(plan), workers)


class _Lengths:
    """How long rows are, and how many of a length make a micro-batch; see `TrainingLoader`."""

    def __init__(
        self,
        sets: Sequence[FeatureSet],
        chat: Chat,
        micro_batch_size: int,
        micro_batch_tokens: int | None,
        audio_positions: Callable[[float], int] | None,
    ) -> None:
        self._sets, self._chat = sets, chat
        self._most_rows, self._most_tokens = micro_batch_size, micro_batch_tokens
        self._audio_positions = audio_positions
        self._tokens: dict[int, Ints] = {}  # of each question of a set, behind the prefix

    def of(self, packed: PackedExample) -> float:
        """Positions of a packed's row; without a bound on them its characters, which order rows as well."""
        this = self._sets[packed.source]
        if self._most_tokens is None:
            return float(this.table.characters[packed.questions].sum())
        if packed.source not in self._tokens:
            self._tokens[packed.source] = np.array(list(self._chat.lengths(this.questions())), np.int64)
        audio = 0
        if self._audio_positions is not None and not this.is_text:
            audio = self._audio_positions(this.table.duration_s[packed.clip])
        return float(len(self._chat.prefix) - 1 + audio + self._tokens[packed.source][packed.questions].sum())

    def count(self, selected: Ints) -> None:
        """Tokenises these questions of the first set, where no others will be asked for."""
        this = self._sets[0]
        clips, numbers = this.table.clip[selected], this.table.number[selected]
        questions = (this.clip(int(c)).questions[n] for c, n in zip(clips, numbers, strict=True))
        self._tokens[0] = np.zeros(len(this.table), np.int64)
        self._tokens[0][selected] = list(self._chat.lengths(questions))

    def rows(self, longest: float) -> int:
        if self._most_tokens is None:
            return self._most_rows
        if longest > self._most_tokens:
            fault = f"is {self._most_tokens}, and a row has {longest:.0f} positions"
            raise UserError("train.micro_batch_tokens", fault, "raise it, or lower data.questions_per_sequence")
        return min(self._most_rows, int(self._most_tokens // longest))


class _Rows(Dataset[Batch | UserError]):
    """Visits -> batch. A user's error is returned and not raised: torch rewrites the exceptions
    that cross from a worker."""

    def __init__(self, sets: Sequence[FeatureSet], chat: Chat, feature_dtype: torch.dtype) -> None:
        self._sets = sets
        self._chat = chat
        self._feature_dtype = feature_dtype

    def __getitem__(self, packed_examples: Sequence[PackedExample]) -> Batch | UserError:
        try:
            return collate(
                [self._example(packed) for packed in packed_examples],
                pad_token_id=self._chat.pad_token_id,
                widths=self._sets[0].widths,
                feature_dtype=self._feature_dtype,
            )
        except UserError as error:
            return error

    def _example(self, packed: PackedExample) -> Example:
        this = self._sets[packed.source]
        clip = this.clip(packed.clip)
        questions = [clip.questions[number] for number in this.table.number[packed.questions]]
        if this.is_text:
            return Example(self._chat.row(questions, audio=False), questions, None, {})
        return Example(self._chat.row(questions), questions, clip, this.features(packed.clip, clip.clip_id))


def _load(rows: _Rows, plan: Iterator[list[PackedExample]], workers: int) -> Iterator[Batch]:
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
