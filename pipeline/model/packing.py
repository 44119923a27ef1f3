"""Attention of packed rows without pairs of two questions: the prefix attends as one row, each question as another.

One dense mask over a packed row would compute every question against every other. Here each question attends as a row
of its own over the keys of its prefix and its own keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.attention_ops import KeysValues
from pipeline.model.positions import TokenMetadata, to_device


@dataclass(frozen=True)
class PackedQuestions:
    """Where the questions of packed rows are: J questions of at most U entries, behind prefixes of at most P.

    Attributes:
        prefix_length: P, entries from the left that hold every prefix.
        row: (J,) row of each question.
        entry: (J, U) flat entry b * T + t of each question's tokens; for padding any entries of its row, none twice in
            succession: the backward pass of a gather on a GPU adds equal indices one after the other.
        valid: (J, U) not padding.
        tokens: (M,) flat indices j * U + u that are not padding.
        token_entries: (M,) `entry` of these tokens.
    """

    prefix_length: int
    row: Tensor
    entry: Tensor
    valid: Tensor
    tokens: Tensor
    token_entries: Tensor

    def to(self, device: torch.device) -> PackedQuestions:
        return PackedQuestions(
            self.prefix_length,
            to_device(self.row, device),
            to_device(self.entry, device),
            to_device(self.valid, device),
            to_device(self.tokens, device),
            to_device(self.token_entries, device),
        )

    def prefix_metadata(self, metadata: TokenMetadata) -> TokenMetadata:
        """Returns the prefixes' metadata, (B, P); entries of questions that reach into these columns are not valid."""
        prefix = metadata.map(lambda x: x[:, : self.prefix_length])
        return TokenMetadata(prefix.position, prefix.segment, prefix.valid & (prefix.segment == 0), prefix.audio)

    def question_metadata(self, metadata: TokenMetadata) -> TokenMetadata:
        """Returns the questions' metadata, (J, U)."""
        question = metadata.map(lambda x: x.flatten()[self.entry])
        return TokenMetadata(question.position, question.segment, self.valid, question.audio)

    def prefix_heads(self, x_BHTE: Tensor) -> Tensor:
        """Returns the heads of the prefixes, (B, H, P, E)."""
        return x_BHTE[:, :, : self.prefix_length]

    def question_heads(self, x_BHTE: Tensor) -> Tensor:
        """Returns the heads of the questions, (J, H, U, E)."""
        return x_BHTE.transpose(1, 2).flatten(0, 1)[self.entry].transpose(1, 2)

    def repeat_for_questions(self, keys_values: KeysValues) -> KeysValues:
        """Repeats the keys and values of each row for each of its questions."""
        return keys_values[0][self.row], keys_values[1][self.row]

    def pack(self, prefix_BHPE: Tensor | None, question_JHUE: Tensor, like: Tensor) -> Tensor:
        """Returns (B, H, T, E), the packed rows, from the attention outputs of prefixes and questions."""
        batch, heads, total, width = like.shape
        out_BTHE = like.new_zeros(batch, total, heads, width)
        if prefix_BHPE is not None:
            out_BTHE = torch.cat([prefix_BHPE.transpose(1, 2), out_BTHE[:, self.prefix_length :]], dim=1)
        question_MHE = question_JHUE.transpose(1, 2).flatten(0, 1)[self.tokens]
        out_NHE = out_BTHE.flatten(0, 1).index_copy(0, self.token_entries, question_MHE)
        return out_NHE.view(batch, total, heads, width).transpose(1, 2)


def find_packed_questions(metadata: TokenMetadata) -> PackedQuestions | None:
    """Returns where the questions of packed rows are; None where nothing is packed or a prefix is not first in its row.

    Args:
        metadata: (B, T) of a layout, on the CPU.
    """
    valid, segment = metadata.valid, metadata.segment
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
    rows = torch.tensor([row for row, _ in questions])
    entry = rows[:, None] * total + torch.arange(longest) % total
    in_question = torch.zeros_like(entry, dtype=torch.bool)
    for number, (row, columns) in enumerate(questions):
        entry[number, : len(columns)] = row * total + columns
        in_question[number, : len(columns)] = True
    tokens = in_question.flatten().nonzero()[:, 0]
    return PackedQuestions(int(in_prefix.sum(1).max()), rows, entry, in_question, tokens, entry.flatten()[tokens])
