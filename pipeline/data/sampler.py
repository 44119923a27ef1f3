"""The order of training: which questions of which clip are seen when, by which rank. Pure numpy, reads no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError

Ints = NDArray[np.int64]


class PackedExample(NamedTuple):
    """One clip with some of its questions, as indices into one of the sets in use: one row of a batch."""

    clip: int
    questions: Ints
    source: int = 0


class Sampler(Protocol):
    """An endless sequence of packed examples; after `examples_per_epoch` of them it begins anew, in another order."""

    @property
    def examples_per_epoch(self) -> int: ...

    def packed_examples(self, start: int, stop: int) -> list[PackedExample]:
        """The packed examples at positions [start, stop)."""
        ...


class PackedSampler:
    """An endless sequence of packed examples that is the same for any number of ranks.

    A packed example is one clip with up to `questions_per_sequence` of its selected questions. An epoch holds each
    selected question exactly once. The packed examples of one clip are spread evenly over the epoch: an epoch is a
    series of passes over the shards, as many as a clip has packed examples on average. Within a pass the shards come in
    random order and are cut into blocks of clips, and packed examples are shuffled inside a block, so that a shard is
    read once a pass. Epochs follow each other without a gap, so a position is one integer, every position can be
    computed by itself, and nothing is dropped at the end of an epoch.

    Args:
        clip_of_question: (questions of the whole set,) index of each question's clip.
        selected: indices of the questions to train on.
        shard_sizes: clips per shard, in storage order.
        questions_per_sequence: most questions in one packed.
        block_clips: shuffle within blocks of this many stored clips.
        seed: the order is a function of it, of the selection and of nothing else.
    """

    def __init__(
        self,
        clip_of_question: NDArray[np.integer],
        selected: NDArray[np.integer],
        shard_sizes: Sequence[int],
        *,
        questions_per_sequence: int,
        block_clips: int,
        seed: int,
    ) -> None:
        if not len(selected):
            raise UserError("data", "no question is selected", "widen data.tasks or data.datasets")
        clips, self._clip_rank, counts = np.unique(clip_of_question[selected], return_inverse=True, return_counts=True)
        self._selected = np.asarray(selected, np.int64)
        self._clips = clips.astype(np.int64)
        self._examples_of_clip = -(-counts // questions_per_sequence)
        # Questions sorted by clip; the packed examples of a clip share its questions as evenly as whole numbers allow.
        first_question = np.cumsum(counts) - counts
        self._clip_index = np.repeat(np.arange(len(clips)), self._examples_of_clip)
        first_example = np.cumsum(self._examples_of_clip) - self._examples_of_clip
        self._number_in_clip = np.arange(len(self._clip_index)) - first_example[self._clip_index]
        self._first = first_question[self._clip_index] + self._share(counts, self._number_in_clip)
        self._size = first_question[self._clip_index] + self._share(counts, self._number_in_clip + 1) - self._first
        self._num_passes = -(-len(self._clip_index) // len(clips))
        self._shard_sizes = np.asarray(shard_sizes, np.int64)
        self._block_clips = block_clips
        self._seed = seed
        self._epochs: dict[int, tuple[Ints, Ints, Ints]] = {}

    def _share(self, counts: Ints, number: Ints) -> Ints:
        return number * counts[self._clip_index] // self._examples_of_clip[self._clip_index]

    @property
    def examples_per_epoch(self) -> int:
        return len(self._clip_index)

    def packed_examples(self, start: int, stop: int) -> list[PackedExample]:
        """The packed examples at positions [start, stop) of the endless sequence."""
        return [self._packed_example(*divmod(position, self.examples_per_epoch)) for position in range(start, stop)]

    def _packed_example(self, epoch: int, position: int) -> PackedExample:
        if epoch not in self._epochs:
            # A global batch spans two epochs at most.
            self._epochs = {known: order for known, order in self._epochs.items() if known == epoch - 1}
            self._epochs[epoch] = self._epoch(epoch)
        clips, questions, starts = self._epochs[epoch]
        return PackedExample(int(clips[position]), questions[starts[position] : starts[position + 1]])

    def _epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """The clip of each packed, all questions in order, where each packed starts (one more entry for the end)."""
        rng = np.random.default_rng([self._seed, epoch])
        permuted = self._selected[np.argsort(self._clip_rank + rng.random(len(self._selected)), kind="stable")]

        # Packed example i of n takes place at (i + u) / n of the epoch, u uniform for each clip.
        offset = rng.random(len(self._clips))[self._clip_index]
        when = (self._number_in_clip + offset) / self._examples_of_clip[self._clip_index]
        pass_number = (when * self._num_passes).astype(np.int64)

        clip_starts = np.cumsum(self._shard_sizes) - self._shard_sizes
        shard = np.searchsorted(clip_starts, self._clips, side="right") - 1
        place = np.empty((self._num_passes, len(self._clips)), np.int64)  # of each clip, shards in the pass's order
        for number in range(self._num_passes):
            shuffled = rng.permutation(len(self._shard_sizes))
            new_starts = np.empty_like(clip_starts)
            new_starts[shuffled] = np.cumsum(self._shard_sizes[shuffled]) - self._shard_sizes[shuffled]
            place[number] = new_starts[shard] + self._clips - clip_starts[shard]
        block = place[pass_number, self._clip_index] // self._block_clips
        num_blocks = -(-int(self._shard_sizes.sum()) // self._block_clips)
        key = pass_number * num_blocks + block + rng.random(len(block))
        order = np.argsort(key, kind="stable")

        size = self._size[order]
        starts = np.concatenate([[0], np.cumsum(size)])
        source = np.repeat(self._first[order] - starts[:-1], size) + np.arange(starts[-1])
        return self._clips[self._clip_index[order]], permuted[source], starts


class MixtureSampler:
    """Several samplers woven into one: an epoch is one of the first order, and every other order has its share of it.

    Where in an epoch each order has its turn is drawn anew for each epoch; each order goes on where it stopped.

    Args:
        samplers: the first one is seen once an epoch; packed examples of order i get `source` i.
        shares: of the other samplers, in all packed examples; together less than 1.
        seed: of the turns.
    """

    def __init__(self, samplers: Sequence[Sampler], shares: Sequence[float], seed: int) -> None:
        self._samplers = samplers
        main = samplers[0].examples_per_epoch
        whole = main / (1 - sum(shares))
        self._counts = np.array([main, *(max(1, round(share * whole)) for share in shares)], np.int64)
        self._seed = seed
        self._turns: tuple[int, NDArray[np.integer], Ints] | None = None

    @property
    def examples_per_epoch(self) -> int:
        return int(self._counts.sum())

    def packed_examples(self, start: int, stop: int) -> list[PackedExample]:
        """The packed examples at positions [start, stop) of the endless sequence."""
        return [self._packed_example(*divmod(position, self.examples_per_epoch)) for position in range(start, stop)]

    def _packed_example(self, epoch: int, position: int) -> PackedExample:
        if self._turns is None or self._turns[0] != epoch:
            self._turns = (epoch, *self._draw_turns(epoch))
        _, sources, numbers = self._turns
        source = int(sources[position])
        number = epoch * int(self._counts[source]) + int(numbers[position])
        return self._samplers[source].packed_examples(number, number + 1)[0]._replace(source=source)

    def _draw_turns(self, epoch: int) -> tuple[NDArray[np.integer], Ints]:
        """Whose turn it is at each position of an epoch, and how many turns that order had before."""
        rng = np.random.default_rng([self._seed, epoch, len(self._samplers)])
        sources = rng.permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        numbers = np.empty(len(sources), np.int64)
        numbers[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(count) for count in self._counts])
        return sources, numbers


def split_micro_batches(
    packed_examples: Sequence[PackedExample],
    length_of: Callable[[PackedExample], float],
    rows_of: Callable[[float], int],
    *,
    rank: int,
    world_size: int,
) -> list[list[PackedExample]]:
    """This rank's micro-batches of some packed examples, equally many and as large on every rank.

    They are sorted by length, longest first: rows of a micro-batch are of like length, and so are the micro-batches
    that the ranks compute at the same time.

    Args:
        packed_examples: a multiple of world_size.
        length_of: length of a packed's row.
        rows_of: length of the longest row -> most rows of a micro-batch.
    """
    lengths = [length_of(packed) for packed in packed_examples]
    by_length = np.argsort(-np.array(lengths), kind="stable")
    micro_batches = []
    first = 0
    while first < len(packed_examples):
        rows = min(rows_of(lengths[by_length[first]]), (len(packed_examples) - first) // world_size)
        last = first + rows * world_size
        micro_batches.append([packed_examples[i] for i in by_length[first + rank : last : world_size]])
        first = last
    return micro_batches
