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

    def tokenise(self, selected: Ints) -> None:
        """Tokenises only these questions of the first set, where no others are read."""
        feature_set = self._sets[0]
        clips, numbers = feature_set.table.clip[selected], feature_set.table.number[selected]
        questions = (feature_set.clip(int(c)).questions[n] for c, n in zip(clips, numbers, strict=True))
        self._token_counts[0] = np.zeros((len(feature_set.table), 2), np.int64)
        self._token_counts[0][selected] = list(self._chat_template.token_counts(questions))

    def _row_length(self, example: PackedExample) -> float:
        """Returns the positions of a row; its characters, which sort rows as well, where positions are not bounded."""
        feature_set = self._sets[example.source]
        table = feature_set.table
        if self._max_tokens is None:
            return float(table.characters[example.questions].sum())
        counts = self._counts_of(example.source)[example.questions]
        audio, prefix_tokens = table.audio_of(example.questions, example.clip), len(self._chat_template.prefix)
        if len(counts):
            prefix_tokens = int(counts[0, 0])
        positions = prefix_tokens + int(counts[:, 1].sum()) - max(len(audio), 1)
        if self._audio_positions is not None and not feature_set.is_text:
            positions += sum(self._audio_positions(table.duration_s[clip]) for clip in audio)
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
            fault = f"is {self._max_tokens}, and a row has {longest:.0f} positions"
            raise UserError("train.micro_batch_tokens", fault, "raise it, or lower data.questions_per_sequence")
        return min(self._max_rows, int(self._max_tokens // longest))
