"""Batches for training and evaluation: torch's DataLoader and its workers follow the order of a sampler."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from itertools import chain, islice, tee
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config import DataConfig, TrainConfig
from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks, read_ranks
from pipeline.data.chat_template import ChatTemplate
from pipeline.data.collate import Batch, Example, collate
from pipeline.data.feature_set import FeatureSet
from pipeline.data.row_lengths import AudioPositions, RowLengths
from pipeline.data.sampler import Ints, MixtureSampler, PackedExample, PackedSampler, Sampler
from pipeline.data.shared_memory import batch_bytes, fitting_workers

_PREFETCHED_BATCHES = 4  # per worker
_PREFETCHED_EXAMPLES = 256  # per round, from a remote feature set
_PREFETCH_PAUSE_S = 0.2


class TrainingLoader:
    """An endless series of this rank's micro-batches, grouped by optimizer step; resumes at any number of ranks.

    Args:
        sets: feature set of `data.train`, then that of each entry of `data.mixture`.
        chat_template: renders the conversations.
        data: selection, mixture, packing, shuffling and workers.
        train: seed, batch sizes and precision. With `micro_batch_tokens` every text is tokenised once, unless
            `question_check` counted the tokens.
        ranks: rank of this process and number of ranks.
        audio_positions: None counts text only against `micro_batch_tokens`.

    Raises:
        UserError: a task or dataset is unknown, nothing is selected, or the global batch does not divide.
    """

    def __init__(
        self,
        sets: Sequence[FeatureSet],
        chat_template: ChatTemplate,
        data: DataConfig,
        train: TrainConfig,
        ranks: Ranks,
        audio_positions: AudioPositions | None = None,
    ) -> None:
        self._sets = sets
        selections = [sets[0].table.select(data.tasks, data.datasets)]
        for number, (mixed_set, mixed) in enumerate(zip(sets[1:], data.mixture, strict=True)):
            selections.append(mixed_set.table.select(mixed.tasks, mixed.datasets, f"data.mixture.{number}"))
        samplers = [
            PackedSampler(
                _groups(feature_set),
                selected,
                feature_set.shard_sizes,
                questions_per_sequence=data.questions_per_sequence,
                block_clips=data.shuffle_block_clips,
                seed=train.seed,
            )
            for feature_set, selected in zip(self._sets, selections, strict=True)
        ]
        shares = [mixed.share for mixed in data.mixture]
        self.sampler: Sampler = MixtureSampler(samplers, shares, train.seed) if shares else samplers[0]
        sizes = [feature_set.shard_sizes for feature_set in self._sets]
        settings = f"{data.questions_per_sequence} {data.shuffle_block_clips} {train.seed} {sizes} {shares}"
        selection_bytes = b" ".join(selected.tobytes() for selected in selections)
        prefixes = [table.prefix for table in (feature_set.table for feature_set in sets) if table.prefix is not None]
        selection_bytes += b"".join(prefix.tobytes() for prefix in prefixes)
        self._fingerprint = hashlib.sha256(settings.encode() + selection_bytes).hexdigest()[:16]
        self._data = data
        self._dataset = _MicroBatchDataset(self._sets, chat_template, feature_dtype(train))
        self._examples_per_step = train.global_batch_size // data.questions_per_sequence
        self._lengths = RowLengths(self._sets, chat_template, train, audio_positions)
        for source, (feature_set, selected) in enumerate(zip(self._sets, selections, strict=True)):
            self._lengths.check_longest(source, selected, _groups(feature_set), data.questions_per_sequence)
        size = batch_bytes(sets, train.micro_batch_size, feature_dtype(train).itemsize)
        self._workers = fitting_workers(data.workers, size, _PREFETCHED_BATCHES)
        self._ranks = ranks
        if self._examples_per_step % ranks.world_size:
            raise UserError(
                "train.global_batch_size",
                f"{self._examples_per_step} sequences do not divide into {ranks.world_size} ranks",
                f"use a multiple of {ranks.world_size} sequences",
            )
        self._start = 0  # packed examples consumed before the current iterator
        self._yielded = 0  # steps yielded by the current iterator

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every selected question of `data.train` is seen once."""
        return self.sampler.examples_per_epoch / self._examples_per_step

    @property
    def tasks(self) -> list[str]:
        """Tasks that questions of this loader may have."""
        return sorted({task for feature_set in self._sets for task in feature_set.table.tasks})

    def __iter__(self) -> Iterator[list[Batch]]:
        """Continues from the loaded state; a second iterator continues after the last step that was yielded."""
        self._start, self._yielded = self._examples_consumed, 0
        plan, steps = tee(self._plan(self._start))
        stopped = threading.Event()
        if any(feature_set.is_cached for feature_set in self._sets):
            threading.Thread(target=self._prefetch, args=(self._start, stopped), daemon=True).start()
        try:
            batches = _load(self._dataset, chain.from_iterable(plan), self._workers)
            for step in steps:
                micro_batches = list(islice(batches, len(step)))
                self._yielded += 1
                yield micro_batches
        finally:
            stopped.set()

    def example(self, packed: PackedExample) -> Example:
        """Returns the row of a packed example with its questions and clips, as batches hold it."""
        return self._dataset.example(packed)

    def _plan(self, start: int) -> Iterator[list[list[PackedExample]]]:
        # A global batch contains the next packed examples for any number of ranks; their order within it does not
        # change the loss.
        while True:
            packed_examples = self.sampler.packed_examples(start, start + self._examples_per_step)
            yield self._lengths.split(packed_examples, self._ranks)
            start += self._examples_per_step

    def _prefetch(self, position: int, stopped: threading.Event) -> None:
        """Downloads the shards that are read next, a quarter of a block ahead; each rank of a node does its share."""
        sampler = copy.deepcopy(self.sampler)  # caches its own epochs
        node_ranks = read_ranks()
        while not stopped.is_set():
            if position >= self._examples_consumed + self._data.shuffle_block_clips // 4:
                stopped.wait(_PREFETCH_PAUSE_S)
                continue
            for example in sampler.packed_examples(position, position + _PREFETCHED_EXAMPLES):
                feature_set = self._sets[example.source]
                clips = feature_set.table.audio_of(example.questions, example.clip)
                try:
                    for clip in dict.fromkeys(clips):
                        feature_set.prefetch(clip, node_ranks.local_rank, node_ranks.local_world_size)
                except UserError:
                    return  # reading a row of this shard raises the same error
            position += _PREFETCHED_EXAMPLES

    @property
    def _examples_consumed(self) -> int:
        return self._start + self._yielded * self._examples_per_step

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last complete step: equal on all ranks, independent of prefetching."""
        return {"packed_examples": self._examples_consumed, "sampler": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes after as many packed examples as the state counts.

        Raises:
            UserError: the state is from another sampling order (set, selection, unfit questions, packing, shuffling or
                seed).
        """
        if state["sampler"] != self._fingerprint:
            raise UserError(
                "data",
                "is not the sampling order that the checkpoint was written with",
                "resume with the same feature set, tasks, datasets, unfit questions (unfit.jsonl), "
                "questions_per_sequence, shuffle_block_clips, seed",
            )
        self._start, self._yielded = state["packed_examples"], 0


def evaluation_batches(
    features: FeatureSet,
    chat_template: ChatTemplate,
    selected: Ints,
    train: TrainConfig,
    ranks: Ranks,
    audio_positions: AudioPositions | None = None,
) -> Iterator[Batch]:
    """Yields each selected question once over all ranks, one per row, longest first: for a validation loss.

    Every rank gets the same number of batches, so that collectives stay in step: a rank that has no question left gets
    rows with a clip and no question, hence without labels.

    Args:
        selected: indices of the questions.
        train, ranks, audio_positions: see `TrainingLoader`.
    """
    clip = features.table.clip
    rows = [PackedExample(int(clip[question]), np.array([question])) for question in selected]
    rows += [PackedExample(int(clip[selected[0]]), np.empty(0, np.int64))] * (-len(rows) % ranks.world_size)
    lengths = RowLengths([features], chat_template, train, audio_positions)
    if train.micro_batch_tokens is not None and features.table.tokens is None:
        lengths.tokenise(selected)
    dataset = _MicroBatchDataset([features], chat_template, feature_dtype(train))
    yield from _load(dataset, iter(lengths.split(rows, ranks)), workers=0)


def _groups(feature_set: FeatureSet) -> Ints:
    """Returns the clip of each question and, where a set has several, the code of its prefix."""
    table = feature_set.table
    return table.clip if table.prefix is None else np.stack([table.clip, table.prefix], axis=1)


def feature_dtype(train: TrainConfig) -> torch.dtype:
    """Returns the dtype of audio features on the host: half precision keeps the shards' bytes, the model casts them."""
    return torch.float32 if train.precision == "fp32" else torch.float16


class _MicroBatchDataset(Dataset[Batch | UserError]):
    """Maps the packed examples of a micro-batch to a batch. Returns a user's error instead of raising it: torch
    rewrites exceptions that cross from a worker."""

    def __init__(self, sets: Sequence[FeatureSet], chat_template: ChatTemplate, dtype: torch.dtype) -> None:
        self._sets = sets
        self._chat_template = chat_template
        self._dtype = dtype

    def __getitem__(self, packed_examples: Sequence[PackedExample]) -> Batch | UserError:
        try:
            return collate(
                [self.example(example) for example in packed_examples],
                pad_token_id=self._chat_template.pad_token_id,
                widths=self._sets[0].widths,
                feature_dtype=self._dtype,
            )
        except UserError as error:
            return error

    def example(self, packed: PackedExample) -> Example:
        feature_set = self._sets[packed.source]
        clip = feature_set.clip(packed.clip)
        questions = [clip.questions[number] for number in feature_set.table.number[packed.questions]]
        if feature_set.is_text:
            return Example(self._chat_template.row(questions, audio=False), questions, None, {})
        row = self._chat_template.row(questions)
        if not (audio := feature_set.table.audio_of(packed.questions, packed.clip)):
            return Example(row, questions, None, {})
        clips = [clip if index == packed.clip else feature_set.clip(index) for index in audio]
        features = [feature_set.features(index, c.clip_id) for index, c in zip(audio, clips, strict=True)]
        others = list(zip(clips[1:], features[1:], strict=True))
        return Example(row, questions, clips[0], features[0], others)


def _load(dataset: _MicroBatchDataset, plan: Iterator[list[PackedExample]], workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        sampler=plan,  # any iterable of indices; these are whole micro-batches
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED_BATCHES if workers else None,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _identity(batch: Any) -> Any:
    return batch
