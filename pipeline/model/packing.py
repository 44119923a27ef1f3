"""Attention of packed rows without the pairs that no conversation has: questions as rows of their own.

One dense mask over a packed row would compute every question against every other. Here the prefix attends as a row,
and each question as another, over the prefix's keys and its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.attention_ops import KeysValues
from pipeline.model.positions import TokenMetadata, to_device


@dataclass(frozen=True)
class PackedQuestions:
    """Where the questions of packed rows lie; Q questions of at most N entries behind prefixes of at most P.

    Attributes:
        prefix: P, entries from the left that hold every prefix.
        row: (Q,) row of each question.
        entry: (Q, N) flat entry b * T + t of each question's tokens; of padding 0.
        valid: (Q, N) not padding.
    """

    prefix: int
    row: Tensor
    entry: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> PackedQuestions:
        return PackedQuestions(
            self.prefix, to_device(self.row, device), to_device(self.entry, device), to_device(self.valid, device)
        )

    def prefix_metadata(self, places: TokenMetadata) -> TokenMetadata:
        """Of the prefixes, (B, P); entries of questions that reach into these columns are not valid."""
        prefix = places.map(lambda x: x[:, : self.prefix])
        return TokenMetadata(prefix.position, prefix.segment, prefix.valid & (prefix.segment == 0), prefix.audio)

    def question_metadata(self, places: TokenMetadata) -> TokenMetadata:
        """Of the questions' own entries, (Q, N)."""
        own = places.map(lambda x: x.flatten()[self.entry])
        return TokenMetadata(own.position, own.segment, self.valid, own.audio)

    def prefix_of(self, x_BHTE: Tensor) -> Tensor:
        """Heads of the prefixes, (B, heads, P, head_dim)."""
        return x_BHTE[:, :, : self.prefix]

    def own(self, x_BHTE: Tensor) -> Tensor:
        """Heads of the questions, (Q, heads, N, head_dim)."""
        return x_BHTE.transpose(1, 2).flatten(0, 1)[self.entry].transpose(1, 2)

    def of_rows(self, pair: KeysValues) -> KeysValues:
        """Keys and values of rows, once for each question of the row."""
        return pair[0][self.row], pair[1][self.row]

    def pack(self, prefix_BHPE: Tensor | None, own_QHNE: Tensor, like: Tensor) -> Tensor:
        """(B, heads, T, head_dim) from what the prefixes and the questions attended."""
        batch, heads, total, width = like.shape
        out = like.new_zeros(batch, total, heads, width)
        if prefix_BHPE is not None:
            out = torch.cat([prefix_BHPE.transpose(1, 2), out[:, self.prefix :]], dim=1)
        flat = out.flatten(0, 1).index_copy(0, self.entry[self.valid], own_QHNE.transpose(1, 2)[self.valid])
        return flat.view(batch, total, heads, width).transpose(1, 2)


def find_packed_questions(places: TokenMetadata) -> PackedQuestions | None:
    """How to unpack rows; None where a prefix does not come first in its row, or nothing is packed.

    Args:
        places: (B, T) of a layout, on the CPU.
    """
    valid, segment = places.valid, places.segment
    in_prefix = valid & (segment == 0)
    packed = valid & (segment > 0)
    if not bool(packed.any()) or bool((packed.cummax(1).values & in_prefix).any()) or not bool(valid[:, 0].all()):
        return None
    total = valid.shape[1]
    questions = [
        (row, (packed[row] & (segment[row] == s)).nonzero()[:, 0])
        for row in range(len(valid))
        for s in segment[row][packed[row]].unique().tolist()
    ]
    longest = max(len(columns) for _, columns in questions)
    entry = torch.zeros(len(questions), longest, dtype=torch.long)
    own = torch.zeros_like(entry, dtype=torch.bool)
    for q, (row, columns) in enumerate(questions):
        entry[q, : len(columns)] = row * total + columns
        own[q, : len(columns)] = True
    rows = torch.tensor([row for row, _ in questions])
    return PackedQuestions(int(in_prefix.sum(1).max()), rows, entry, own)
