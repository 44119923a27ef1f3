"""Connectors: audio features -> audio tokens. All take and give flat tokens of clips one after the other, unpadded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.streams import Connector


class Mlp(nn.Module):
    """Linear-GELU-Linear; the activation is computed again in the backward pass instead of being kept."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, width_out)
        self.output = nn.Linear(width_out, width_out)

    def forward(self, x_NW: Tensor) -> Tensor:
        h_ND = self.input(x_NW)
        if torch.is_grad_enabled() and h_ND.requires_grad:
            # Recomputation stops as soon as the activation is there again: the matrix product is not repeated.
            return checkpoint(self._finish, h_ND, use_reentrant=False, preserve_rng_state=False)
        return self._finish(h_ND)

    def _finish(self, h_ND: Tensor) -> Tensor:
        return self.output(F.gelu(h_ND))


class ConnectorModule(Protocol):
    """What a stream asks of its connector."""

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        """(num_clips,) audio tokens of clips with these frames, one (num_clips,) tensor for each encoder."""

    def __call__(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """(total_tokens, width) from one (total_frames, encoder_width) tensor for each encoder; lengths on the CPU."""


class FrameConnector(nn.Module):
    """`linear` and `mlp`: one token for each frame."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        return lengths[0]

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        return self.project(features[0])


class ConvConnector(nn.Module):
    """`conv`: Conv1d with kernel and stride `summary_stride`, right-padded with zeros, then an MLP (v3, section 3.3)."""

    def __init__(self, summary_stride: int, encoder_width: int, width: int) -> None:
        super().__init__()
        self.summary_stride = summary_stride
        self.conv = nn.Conv1d(encoder_width, encoder_width, summary_stride, stride=summary_stride)
        self.project = Mlp(encoder_width, width)

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        return -(-lengths[0] // self.summary_stride)

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        x_NW, r = features[0], self.summary_stride
        if bool((lengths[0] % r).any()):
            padded = torch.nn.utils.rnn.pad_sequence(list(x_NW.split(lengths[0].tolist())), batch_first=True)
            counts = self.token_counts(lengths)
            padded = F.pad(padded, (0, 0, 0, int(counts.max()) * r - padded.shape[1]))
            kept = torch.arange(int(counts.max()))[None] < counts[:, None]
            x_NW = padded.unflatten(1, (-1, r))[kept.to(x_NW.device)].flatten(0, 1)
        # Groups do not overlap and every clip fills whole groups, so all clips are one signal.
        return self.project(self.conv(x_NW.T[None])[0].T)


def build_connector(spec: Connector, encoder_widths: Sequence[int], width: int) -> ConnectorModule:
    """The connector of a stream.

    Args:
        encoder_widths: widths of the encoders it reads, in their order.
        width: of the audio tokens it gives.
    """
    if spec.kind == "linear":
        return FrameConnector(nn.Linear(encoder_widths[0], width))
    if spec.kind == "mlp":
        return FrameConnector(Mlp(encoder_widths[0], width))
    return ConvConnector(spec.summary_stride, encoder_widths[0], width)
