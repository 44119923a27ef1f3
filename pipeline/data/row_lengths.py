"""The length of each row in positions, and micro-batches of rows that together stay within a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.config import TrainConfig
from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks
from pipeline.data.chat_template import ChatTemplate
from pipeline.data.feature_set import FeatureSet
from pipeline.data.sampler import Ints, PackedExample, split_micro_batches

AudioPositions = Callable[[float], int]  # seconds of a clip -> approximate positions of its audio in the sequence


class RowLengths:
    """Lengths of rows, and the micro-batches that stay within the bounds of `train`.

    Args:
        sets, chat_template, train, audio_positions: see `TrainingLoader`.
    """

    def __init__(
        self,
        sets: Sequence[FeatureSet],
        chat_template: ChatTemplate,
        train: TrainConfig,
        audio_positions: AudioPositions | None,
    ) -> None:
        self._sets, self._chat_template = sets, chat_template
        self._max_rows, self._max_tokens = train.micro_batch_size, train.micro_batch_tokens
        self._audio_positions = audio_positions
        # set -> (questions, 2) tokens up to and including the first placeholder, and after it
        self._token_counts: dict[int, Ints] = {}

    def split(self, packed_examples: Sequence[PackedExample], ranks: Ranks) -> list[list[PackedExample]]:
        """Returns this rank's micro-batches of some packed examples."""
        return split_micro_batches(
            packed_examples, self._row_length, self._rows_of, rank=ranks.rank, world_size=ranks.world_size
        )

    def check_longest(self, source: int, selected: Ints, groups: Ints, questions_per_sequence: int) -> None:
        """Checks that no row that a sampler may pack is longer than `train.micro_batch_tokens`.

        Does nothing if no bound is set, or if the tokens of the set are not counted yet.

        Args:
            source: index of the set.
            selected: indices of the questions to train on.
            groups: clip of each question, or its clip and the code of its prefix; see `PackedSampler`.

        Raises:
            UserError: the longest possible row is too long; names one of its questions.
        """
        feature_set = self._sets[source]
        if self._max_tokens is None or feature_set.table.tokens is None:
            return
        counts = self._counts_of(source)
        suffixes = counts[selected, 1].copy()
        further = np.flatnonzero(np.isin(selected, np.fromiter(feature_set.table.audio, np.int64)))
        for position in further.tolist():
            _, *others = feature_set.table.audio[int(selected[position])] or (0,)
            suffixes[position] += sum(self._positions_of(source, clip) - 1 for clip in others)
        _, group = np.unique(groups.reshape(len(groups), -1)[selected], axis=0, return_inverse=True)
        group = group.reshape(-1)
        order = np.lexsort((-suffixes, group))
        sizes = np.bincount(group)
        starts = np.cumsum(sizes) - sizes
        packed = np.arange(len(order)) - np.repeat(starts, sizes) < questions_per_sequence
        totals = np.add.reduceat(np.where(packed, suffixes[order], 0), starts)
        longest_question = selected[order[starts]]  # of each group
        totals += counts[longest_question, 0] - 1
        own = np.array([self._positions_of(source, int(clip)) for clip in feature_set.table.clip[longest_question]])
        totals += own
        longest = int(totals.argmax())
        if totals[longest] > self._max_tokens:
            index = int(longest_question[longest])
            clip = feature_set.clip(int(feature_set.table.clip[index]))
            name = clip.questions[feature_set.table.number[index]].question_id
            raise self._too_long(int(totals[longest]), f"a row with question '{name}' may have")

    def _positions_of(self, source: int, clip: int) -> int:
        """Returns the positions of a clip's audio."""
        feature_set = self._sets[source]
        if self._audio_positions is None or feature_set.is_text:
            return 0
        return self._audio_positions(float(feature_set.table.duration_s[clip]))

    def _too_long(self, positions: float, what: str) -> UserError:
        fault = f"is {self._max_tokens}, and {what} {positions:.0f} positions"
        return UserError("train.micro_batch_tokens", fault, "raise it, or lower data.questions_per_sequence")

    def tokenise(self, selected: Ints) -> None:
        """Tokenises only these questions of the first set, where no others are read."""
        feature_set = self._sets[0]
        clips, numbers = feature_set.table.clip[selected], feature_set.table.number[selected]
        questions = (feature_set.clip(int(c)).questions[n] for c, n in zip(clips, numbers, strict=True))
        self._token_counts[0] = np.zeros((len(feature_set.table), 2), np.int64)
        self._token_counts[0][selected] = list(self._chat_template.token_counts(questions))

    def _row_length(self, example: PackedExample) -> float:
        """Returns the positions of a row, with its audio in the sequence: a micro-batch is padded to its longest row.

        Returns its characters where positions are not bounded and the tokens of the set are not counted yet.
        """
        table = self._sets[example.source].table
        if self._max_tokens is None and table.tokens is None:
            return float(table.characters[example.questions].sum())
        counts = self._counts_of(example.source)[example.questions]
        audio, prefix_tokens = table.audio_of(example.questions, example.clip), len(self._chat_template.prefix)
        if len(counts):
            prefix_tokens = int(counts[0, 0])
        positions = prefix_tokens + int(counts[:, 1].sum()) - max(len(audio), 1)
        positions += sum(self._positions_of(example.source, clip) for clip in audio)
        return float(positions)

    def _counts_of(self, source: int) -> Ints:
        if source not in self._token_counts:
            table = self._sets[source].table
            if table.tokens is not None and table.prefix_tokens is not None:
                self._token_counts[source] = np.stack([table.prefix_tokens, table.tokens], axis=1)
            else:
                counts = list(self._chat_template.token_counts(self._sets[source].questions()))
                self._token_counts[source] = np.array(counts, np.int64).reshape(-1, 2)
        return self._token_counts[source]

    def _rows_of(self, longest: float) -> int:
        """Returns how many rows fit into a micro-batch whose longest row has this length."""
        if self._max_tokens is None:
            return self._max_rows
        if longest > self._max_tokens:
            raise self._too_long(longest, "a row has")
        return min(self._max_rows, int(self._max_tokens // longest))
