"""The sampling order of training: decides which rank sees which questions of which clip when. Pure numpy, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError

Ints = NDArray[np.int64]


class PackedExample(NamedTuple):
    """One clip with some of its questions: one row of a batch.

    Attributes:
        clip: index of the clip in its feature set.
        questions: indices of the questions in the same set.
        source: index of the feature set among those trained on.
    """

    clip: int
    questions: Ints
    source: int = 0


class Sampler(Protocol):
    """An endless sequence of packed examples; every `examples_per_epoch` of them an epoch begins, in a new order."""

    @property
    def examples_per_epoch(self) -> int: ...

    def packed_examples(self, start: int, stop: int) -> list[PackedExample]:
        """Returns the packed examples at positions [start, stop)."""
        ...


class PackedSampler:
    """An endless sequence of packed examples that is the same for any number of ranks.

    A packed example is one clip with up to `questions_per_sequence` of its selected questions. An epoch contains each
    selected question exactly once. The packed examples of one clip are spread evenly over the epoch: an epoch is a
    series of passes over the shards, as many as a clip has packed examples on average. Within a pass the shards come in
    random order and are split into blocks of clips, and packed examples are shuffled inside a block, so that each shard
    is read once a pass. Epochs follow each other without a gap, so a position is one integer, every position can be
    computed independently, and no example is dropped at the end of an epoch.

    Args:
        clip_of_question: (questions of the whole set,) index of each question's clip; or (questions, 2) with a code
            beside it, so that only questions with the same code share a packed example.
        selected: indices of the questions to train on.
        shard_sizes: clips per shard, in storage order.
        questions_per_sequence: maximum number of questions in one packed example.
        block_clips: shuffle within blocks of this many stored clips.
        seed: random seed; the order depends on it and on the other arguments, not on the number of ranks.

    Raises:
        UserError: no question is selected.
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
        groups = clip_of_question.reshape(len(clip_of_question), -1)[selected]
        codes = 1 + (int(groups[:, 1].max()) if groups.shape[1] > 1 else 0)
        group_numbers = groups[:, 0].astype(np.int64) * codes + (groups[:, 1] if groups.shape[1] > 1 else 0)
        clips, self._clip_rank, counts = np.unique(group_numbers, return_inverse=True, return_counts=True)
        self._selected = np.asarray(selected, np.int64)
        self._clips = clips.astype(np.int64) // codes  # of each group of questions that may share a packed example
        self._examples_of_clip = -(-counts // questions_per_sequence)
        # Questions sorted by clip; the packed examples of a clip share its questions as evenly as whole numbers allow.
        first_question = np.cumsum(counts) - counts
        self._clip_index = np.repeat(np.arange(len(clips)), self._examples_of_clip)
        first_example = np.cumsum(self._examples_of_clip) - self._examples_of_clip
        self._number_in_clip = np.arange(len(self._clip_index)) - first_example[self._clip_index]
        begin, end = (self._first_in_clip(counts, self._number_in_clip + shift) for shift in (0, 1))
        self._first = first_question[self._clip_index] + begin
        self._size = end - begin
        self._num_passes = -(-len(self._clip_index) // len(np.unique(self._clips)))
        self._shard_sizes = np.asarray(shard_sizes, np.int64)
        self._block_clips = block_clips
        self._seed = seed
        self._epochs: dict[int, tuple[Ints, Ints, Ints]] = {}

    def _first_in_clip(self, counts: Ints, example_numbers: Ints) -> Ints:
        """Returns, for each packed example number of a clip, the number of its first question in the clip."""
        return example_numbers * counts[self._clip_index] // self._examples_of_clip[self._clip_index]

    @property
    def examples_per_epoch(self) -> int:
        return len(self._clip_index)

    def packed_examples(self, start: int, stop: int) -> list[PackedExample]:
        """Returns the packed examples at positions [start, stop) of the endless sequence."""
        return [self._packed_example(*divmod(position, self.examples_per_epoch)) for position in range(start, stop)]

    def _packed_example(self, epoch: int, position: int) -> PackedExample:
        if epoch not in self._epochs:
            # A global batch spans two epochs at most.
            self._epochs = {number: arrays for number, arrays in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = self._shuffle_epoch(epoch)
        clips, questions, starts = self._epochs[epoch]
        return PackedExample(int(clips[position]), questions[starts[position] : starts[position + 1]])

    def _shuffle_epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Returns the clip of each packed example, all questions in sampling order, and the index among them of each
        packed example's first question (with one more entry for the end)."""
        rng = np.random.default_rng([self._seed, epoch])
        permuted = self._selected[np.argsort(self._clip_rank + rng.random(len(self._selected)), kind="stable")]

        # Packed example i of n comes at (i + u) / n of the epoch, u uniform for each clip.
        offset = rng.random(len(self._clips))[self._clip_index]
        epoch_fraction = (self._number_in_clip + offset) / self._examples_of_clip[self._clip_index]
        pass_number = (epoch_fraction * self._num_passes).astype(np.int64)

        clip_starts = np.cumsum(self._shard_sizes) - self._shard_sizes
        shard = np.searchsorted(clip_starts, self._clips, side="right") - 1
        # (passes, clips): index of each clip when the shards are in the order of the pass.
        clip_positions = np.empty((self._num_passes, len(self._clips)), np.int64)
        for number in range(self._num_passes):
            shuffled = rng.permutation(len(self._shard_sizes))
            new_starts = np.empty_like(clip_starts)
            new_starts[shuffled] = np.cumsum(self._shard_sizes[shuffled]) - self._shard_sizes[shuffled]
            clip_positions[number] = new_starts[shard] + self._clips - clip_starts[shard]
        block = clip_positions[pass_number, self._clip_index] // self._block_clips
        num_blocks = -(-int(self._shard_sizes.sum()) // self._block_clips)
        sort_keys = pass_number * num_blocks + block + rng.random(len(block))
        permutation = np.argsort(sort_keys, kind="stable")

        sizes = self._size[permutation]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        question_indices = np.repeat(self._first[permutation] - starts[:-1], sizes) + np.arange(starts[-1])
        return self._clips[self._clip_index[permutation]], permuted[question_indices], starts


class MixtureSampler:
    """Interleaves several samplers: an epoch is one epoch of the first, in which every other one has its share.

    The positions of each sampler's examples are reshuffled for each epoch; each sampler resumes where it stopped.

    Args:
        samplers: the first one completes one epoch per epoch; packed examples of sampler i get `source` i.
        shares: share of each other sampler in all packed examples; they sum to less than 1.
        seed: random seed of the interleaving.
    """

    def __init__(self, samplers: Sequence[Sampler], shares: Sequence[float], seed: int) -> None:
        self._samplers = samplers
        first_count = samplers[0].examples_per_epoch
        total = first_count / (1 - sum(shares))
        self._counts = np.array([first_count, *(max(1, round(share * total)) for share in shares)], np.int64)
        self._seed = seed
        self._interleaving: tuple[int, NDArray[np.integer], Ints] | None = None

    @property
    def examples_per_epoch(self) -> int:
        return int(self._counts.sum())

    def packed_examples(self, start: int, stop: int) -> list[PackedExample]:
        """Returns the packed examples at positions [start, stop) of the endless sequence."""
        return [self._packed_example(*divmod(position, self.examples_per_epoch)) for position in range(start, stop)]

    def _packed_example(self, epoch: int, position: int) -> PackedExample:
        if self._interleaving is None or self._interleaving[0] != epoch:
            self._interleaving = (epoch, *self._interleave(epoch))
        _, sources, numbers = self._interleaving
        source = int(sources[position])
        number = epoch * int(self._counts[source]) + int(numbers[position])
        return self._samplers[source].packed_examples(number, number + 1)[0]._replace(source=source)

    def _interleave(self, epoch: int) -> tuple[NDArray[np.integer], Ints]:
        """Returns the sampler at each position of an epoch, and how many earlier positions have the same sampler."""
        rng = np.random.default_rng([self._seed, epoch, len(self._samplers)])
        sources = rng.permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        numbers = np.empty(len(sources), np.int64)
        numbers[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(count) for count in self._counts])
        return sources, numbers


def split_micro_batches(
    packed_examples: Sequence[PackedExample],
    row_length: Callable[[PackedExample], float],
    max_rows: Callable[[float], int],
    *,
    rank: int,
    world_size: int,
) -> list[list[PackedExample]]:
    """Returns this rank's micro-batches of some packed examples; every rank gets as many, of the same sizes.

    Packed examples are sorted by length, longest first: rows of a micro-batch are similarly long, and so are the
    micro-batches that the ranks compute at the same time.

    Args:
        packed_examples: their number is a multiple of world_size.
        row_length: returns the length of a packed example's row.
        max_rows: maps the length of the longest row to the maximum number of rows of a micro-batch.
    """
    lengths = [row_length(example) for example in packed_examples]
    by_length = np.argsort(-np.array(lengths), kind="stable")
    micro_batches = []
    first = 0
    while first < len(packed_examples):
        rows = min(max_rows(lengths[by_length[first]]), (len(packed_examples) - first) // world_size)
        last = first + rows * world_size
        micro_batches.append([packed_examples[i] for i in by_length[first + rank : last : world_size]])
        first = last
    return micro_batches
