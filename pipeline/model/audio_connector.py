"""What all connectors share: how many audio tokens a clip becomes, and the sizes of those with attention blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector

Grid = Sequence[int] | None  # (time, frequency) cells per window of an encoder; None without a grid


@dataclass(frozen=True)
class BlockSizes:
    """Layers, attention heads and width of a connector with attention blocks."""

    layers: int
    heads: int
    hidden: int


# BLIP-2's Q-Former (arXiv 2301.12597, section 3.1), as audio models use it, and Cambrian-1's spatial vision aggregator
# (arXiv 2406.16860, section 3).
DEFAULT_SIZES = {"qformer": BlockSizes(12, 12, 768), "lfst": BlockSizes(3, 16, 1024)}


def block_sizes(spec: Connector) -> BlockSizes:
    """Returns the sizes of a `qformer` or `lfst`: its settings, or the default of its kind.

    Raises:
        UserError: the heads do not divide the width.
    """
    default = DEFAULT_SIZES[spec.kind]
    hidden, heads = spec.hidden_size or default.hidden, spec.num_heads or default.heads
    if hidden % heads:
        raise UserError("model.connector.num_heads", f"{heads} does not divide hidden_size {hidden}", "change one")
    return BlockSizes(spec.num_layers or default.layers, heads, hidden)


class AudioConnector(nn.Module, ABC):
    """Maps the features of clips to their audio tokens.

    Args:
        spec: settings of the connector.
        encoder_grids: grid of each encoder that the connector reads.
    """

    def __init__(self, spec: Connector, encoder_grids: Sequence[Grid]) -> None:
        super().__init__()
        self.spec = spec
        self.encoder_grids = tuple(encoder_grids)

    @staticmethod
    @abstractmethod
    def count_tokens(spec: Connector, encoder_grids: Sequence[Grid], frames: Sequence[int]) -> int:
        """Returns the number of audio tokens of one clip; needs no module, so that plans can ask too.

        Args:
            encoder_grids, frames: grid, and frames of the clip, of each encoder that the connector reads.
        """

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        """Returns the (num_clips,) numbers of audio tokens.

        Args:
            lengths: for each encoder (num_clips,) frames of the clips, on the CPU.
        """
        clips = zip(*(length.tolist() for length in lengths), strict=True)
        return torch.tensor(
            [self.count_tokens(self.spec, self.encoder_grids, frames) for frames in clips], dtype=torch.long
        )

    def frames_of_a_step(self) -> list[int]:
        """Returns for each encoder the fewest frames that the connector can read."""
        return [1]
