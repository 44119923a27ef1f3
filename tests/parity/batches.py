"""Conversations for the oracle, and the same conversations as a batch for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.parity.families import VOCABULARY

Clip = Mapping[str, Tensor]
AUDIO_TOKEN = VOCABULARY  # outside the vocabulary: embedding a placeholder fails
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """One row of a batch: items (token ids and clips) that all conversations share, then the conversations.

    An unpacked row is one conversation without a shared prefix.
    """

    conversations: Sequence[Sequence[int | Clip]]
    prefix: Sequence[int | Clip] = ()

    def alone(self) -> list[list[int | Clip]]:
        """Returns each conversation as it would be without packing."""
        return [[*self.prefix, *conversation] for conversation in self.conversations]

    def columns(self) -> list[list[int]]:
        """Returns, for each conversation alone, the column of each of its items in the row."""
        start, columns = len(self.prefix), []
        for conversation in self.conversations:
            columns.append([*range(len(self.prefix)), *range(start, start + len(conversation))])
            start += len(conversation)
        return columns


def labels_of(row: Row, loss_on: str) -> list[list[int]]:
    """Returns the labels of each conversation alone: on its last three tokens, or on all text but the first tokens."""
    labels = []
    for items in row.alone():
        first = len(items) - 3 if loss_on == "answer" else max(2, len(row.prefix))
        labels.append([item if i >= first and isinstance(item, int) else IGNORE_INDEX for i, item in enumerate(items)])
    return labels


def collate(rows: Sequence[Row], encoders: Sequence[str], loss_on: str) -> dict[str, Tensor | dict[str, Tensor]]:
    """Collates `rows` for the model: right-padded, clips as placeholders, their frames concatenated."""
    length = max(len(row.prefix) + sum(map(len, row.conversations)) for row in rows)
    shape = (len(rows), length)
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    attention_mask, segment_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    clips: list[Clip] = []
    for number, row in enumerate(rows):
        items = [*row.prefix, *(item for conversation in row.conversations for item in conversation)]
        for column, item in enumerate(items):
            input_ids[number, column] = item if isinstance(item, int) else AUDIO_TOKEN
            attention_mask[number, column] = 1
        clips.extend(item for item in items if not isinstance(item, int))
        for segment, (columns, row_labels) in enumerate(zip(row.columns(), labels_of(row, loss_on), strict=True), 1):
            for column, label in zip(columns, row_labels, strict=True):
                if label != IGNORE_INDEX:
                    labels[number, column] = label
                if row.prefix and column >= len(row.prefix):
                    segment_ids[number, column] = segment
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "segment_ids": segment_ids,
        "audio_features": {
            name: torch.cat([torch.zeros(0, ENCODERS[name]), *(clip[name] for clip in clips)]) for name in encoders
        },
        "audio_lengths": {
            name: torch.tensor([len(clip[name]) for clip in clips], dtype=torch.int64) for name in encoders
        },
    }


ENCODERS = {"whisper": 5, "sslam": 6, "clap": 7}  # widths
GRIDS = {"sslam": (8, 4), "clap": (4, 2)}  # (time, frequency) cells per window


class Conversations:
    """Random text and clips; in each clip the encoders have different numbers of frames."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, length: int) -> list[int]:
        return [int(i) for i in torch.randint(3, VOCABULARY, (length,), generator=self.generator)]

    def clip(self, frames: int) -> Clip:
        return self.clip_of({name: frames + extra for extra, name in enumerate(ENCODERS)})

    def clip_of(self, frames: Mapping[str, int]) -> Clip:
        return {
            name: torch.randn(count, ENCODERS[name], generator=self.generator, dtype=torch.float64)
            for name, count in frames.items()
        }


def batches(seed: int = 0) -> dict[str, list[Row]]:
    """Returns batches whose rows must equal their conversations alone. Lengths are no multiples of summary_stride."""
    make = Conversations(seed)
    text, clip = make.text, make.clip
    return {
        "padding": [Row([[*text(2), clip(4), *text(5)]]), Row([[*text(3), clip(7), *text(8)]])],
        "equal_lengths": [Row([[*text(2), clip(3), *text(5)]]), Row([[*text(2), clip(3), *text(5)]])],
        "several_clips": [Row([[clip(2), *text(3), clip(4), clip(1), *text(4)]]), Row([[*text(2), clip(3), *text(4)]])],
        "text_only_row": [Row([text(6)]), Row([[*text(2), clip(5), *text(4)]])],
        "text_only_batch": [Row([text(6)]), Row([text(5)])],
        "packing": [
            Row([text(5), text(4), text(6)], prefix=[*text(2), clip(4)]),
            Row([text(4), text(5)], prefix=[clip(2), *text(1), clip(3), *text(2)]),
            Row([[*text(1), clip(2), *text(4)]]),
        ],
        "everything": [
            Row([text(5), text(4)], prefix=[*text(2), clip(4)]),
            Row([[text(1)[0], clip(3), *text(2), clip(2), *text(4)]]),
            Row([text(5)]),
        ],
        "dialogue": [
            Row([[*text(2), clip(3), *text(5), clip(4), *text(6)]]),
            Row([[*text(3), clip(2), *text(5)], text(4), [clip(1), clip(3), *text(6)]], prefix=[*text(2), clip(3)]),
        ],
    }


def grid_batch(seed: int = 0) -> list[Row]:
    """Returns rows with clips of whole time steps of `GRIDS`: part of a window, half a window, and more than one."""
    make = Conversations(seed)
    text = make.text
    part, half, long = (
        make.clip_of({name: times // (8 // grid[0]) * grid[1] for name, grid in GRIDS.items()}) for times in (2, 4, 10)
    )
    uneven = make.clip_of({"sslam": 3 * 4, "clap": 2 * 2})
    return [
        Row([text(5), text(4)], prefix=[*text(2), half]),
        Row([[*text(1), part, *text(2), long, *text(4)]]),
        Row([text(5)]),
        Row([[*text(1), uneven, *text(4)]]),
    ]
