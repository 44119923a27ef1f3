"""Connectors turn audio features into audio tokens. Clips of a batch come and go back to back, unpadded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.core.streams import Connector, ConnectorKind
from pipeline.model.audio_connector import AudioConnector, Grid, block_sizes
from pipeline.model.layers import CrossAttention, Mlp
from pipeline.model.lfst import LfstConnector
from pipeline.model.positions import to_device


class FrameConnector(AudioConnector):
    """`linear` and `mlp`: one token for each frame."""

    def __init__(
        self, spec: Connector, encoder_widths: Sequence[int], encoder_grids: Sequence[Grid], width: int
    ) -> None:
        super().__init__(spec, encoder_grids)
        self.project = (nn.Linear if spec.kind == "linear" else Mlp)(encoder_widths[0], width)

    @staticmethod
    def count_tokens(spec: Connector, encoder_grids: Sequence[Grid], frames: Sequence[int]) -> int:
        return frames[0]

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """Returns the audio tokens of all clips, (total_tokens, width).

        Args:
            features: for each encoder (total_frames, encoder_width).
            lengths: for each encoder (num_clips,) frames of the clips, on the CPU.
        """
        return self.project(features[0])


class ConvConnector(AudioConnector):
    """`conv`: a Conv1d whose kernel and stride are `summary_stride`, padded with zeros on the right, then an MLP.

    It reads the encoder's own output (arXiv 2506.10423 v3, section 3.3).
    """

    def __init__(
        self, spec: Connector, encoder_widths: Sequence[int], encoder_grids: Sequence[Grid], width: int
    ) -> None:
        super().__init__(spec, encoder_grids)
        stride, encoder_width = spec.summary_stride, encoder_widths[0]
        self.conv = nn.Conv1d(encoder_width, encoder_width, stride, stride=stride)
        self.project = Mlp(encoder_width, width)

    @staticmethod
    def count_tokens(spec: Connector, encoder_grids: Sequence[Grid], frames: Sequence[int]) -> int:
        return -(-frames[0] // spec.summary_stride)

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """See `FrameConnector.forward`."""
        x_NW, stride = features[0], self.spec.summary_stride
        if bool((lengths[0] % stride).any()):
            clips = x_NW.split(lengths[0].tolist())
            x_NW = torch.cat([F.pad(clip_FW, (0, 0, 0, -len(clip_FW) % stride)) for clip_FW in clips])
        # Groups do not overlap and every clip fills whole groups, so all clips are one signal.
        return self.project(self.conv(x_NW.T[None])[0].T)


class QFormerBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the frames if `cross`, then an FFN; norms come afterwards."""

    def __init__(self, hidden: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attention = CrossAttention(hidden, hidden, hidden, num_heads)
        self.self_norm = nn.LayerNorm(hidden)
        self.cross_attention = CrossAttention(hidden, hidden, hidden, num_heads) if cross else None
        self.cross_norm = nn.LayerNorm(hidden) if cross else None
        self.ffn = Mlp(hidden, hidden, inner=4 * hidden)
        self.ffn_norm = nn.LayerNorm(hidden)

    def forward(self, x_CQD: Tensor, frames_CFD: Tensor, mask_CQF: Tensor) -> Tensor:
        x_CQD = self.self_norm(x_CQD + self.self_attention(x_CQD, x_CQD))
        if self.cross_attention is not None and self.cross_norm is not None:
            x_CQD = self.cross_norm(x_CQD + self.cross_attention(x_CQD, frames_CFD, mask_CQF))
        return self.ffn_norm(x_CQD + self.ffn(x_CQD))


class QFormerConnector(AudioConnector):
    """`qformer`: a fixed number of learnable queries reads each clip; a GELU MLP maps them to the tokens' width.

    Every second block attends to the frames.
    """

    def __init__(
        self, spec: Connector, encoder_widths: Sequence[int], encoder_grids: Sequence[Grid], width: int
    ) -> None:
        super().__init__(spec, encoder_grids)
        sizes = block_sizes(spec)
        self.queries = nn.Parameter(torch.empty(spec.num_queries, sizes.hidden))
        self.frames_in = nn.Linear(encoder_widths[0], sizes.hidden)
        self.frames_norm = nn.LayerNorm(sizes.hidden)
        self.blocks = nn.ModuleList(
            QFormerBlock(sizes.hidden, sizes.heads, cross=index % 2 == 0) for index in range(sizes.layers)
        )
        self.project = Mlp(sizes.hidden, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)

    @staticmethod
    def count_tokens(spec: Connector, encoder_grids: Sequence[Grid], frames: Sequence[int]) -> int:
        return spec.num_queries

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """See `FrameConnector.forward`."""
        frames_ND = self.frames_norm(self.frames_in(features[0]))
        frames_CFD = pad_sequence(list(frames_ND.split(lengths[0].tolist())), batch_first=True)
        mask_C1F = to_device((torch.arange(frames_CFD.shape[1]) < lengths[0][:, None])[:, None], frames_ND.device)
        x_CQD = self.queries.expand(len(frames_CFD), -1, -1)
        for block in self.blocks:
            x_CQD = block(x_CQD, frames_CFD, mask_C1F.expand(-1, x_CQD.shape[1], -1))
        return self.project(x_CQD.flatten(0, 1))


_CONNECTORS: dict[ConnectorKind, type[FrameConnector | ConvConnector | QFormerConnector | LfstConnector]] = {
    "linear": FrameConnector,
    "mlp": FrameConnector,
    "conv": ConvConnector,
    "qformer": QFormerConnector,
    "lfst": LfstConnector,
}


def build_connector(
    spec: Connector, encoder_widths: Sequence[int], encoder_grids: Sequence[Grid], width: int
) -> AudioConnector:
    """Builds the connector of a stream.

    Args:
        encoder_widths, encoder_grids: width and grid of each encoder that the stream reads, in its order.
        width: width of the audio tokens.

    Raises:
        UserError: settings that do not fit each other or the encoders.
    """
    return _CONNECTORS[spec.kind](spec, encoder_widths, encoder_grids, width)


def count_audio_tokens(spec: Connector, encoder_grids: Sequence[Grid], frames: Sequence[int]) -> int:
    """Returns how many audio tokens a connector makes of one clip; see `AudioConnector.count_tokens`.

    Raises:
        UserError: encoders whose grids the connector cannot read.
    """
    return _CONNECTORS[spec.kind].count_tokens(spec, encoder_grids, frames)
