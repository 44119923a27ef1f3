"""Connectors: audio features -> audio tokens. All take and give flat tokens of clips one after the other, unpadded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector
from pipeline.model.layers import CrossAttention, Mlp
from pipeline.model.lfst import LfstConnector
from pipeline.model.positions import to_device

# BLIP-2's Q-Former (arXiv 2301.12597, section 3.1), as audio models use it; 32 queries are in `streams.Connector`.
QFORMER_LAYERS, QFORMER_HEADS, QFORMER_HIDDEN_SIZE = 12, 12, 768


class OneEncoderConnector(nn.Module):
    """What connectors of a single encoder share."""

    def frames_of_a_step(self) -> list[int]:
        """For each encoder the fewest frames that the connector can read."""
        return [1]


class FrameConnector(OneEncoderConnector):
    """`linear` and `mlp`: one token for each frame."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        """(num_clips,) tokens of clips with these frames; here and below one (num_clips,) tensor for each encoder."""
        return lengths[0]

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """(total_tokens, width) from one (total_frames, encoder_width) for each encoder; `lengths` are on the CPU."""
        return self.project(features[0])


class ConvConnector(OneEncoderConnector):
    """`conv`: Conv1d with kernel and stride `summary_stride`, padded with zeros on the right, then an MLP.

    v3, section 3.3: on the encoder's own output.
    """

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
            clips = x_NW.split(lengths[0].tolist())
            x_NW = torch.cat([F.pad(clip, (0, 0, 0, -len(clip) % r)) for clip in clips])
        # Groups do not overlap and every clip fills whole groups, so all clips are one signal.
        return self.project(self.conv(x_NW.T[None])[0].T)


class QFormerBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the frames in every second block, FFN; norms afterwards."""

    def __init__(self, hidden: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attention = CrossAttention(hidden, hidden, hidden, num_heads)
        self.self_norm = nn.LayerNorm(hidden)
        self.cross_attention = CrossAttention(hidden, hidden, hidden, num_heads) if cross else None
        self.cross_norm = nn.LayerNorm(hidden) if cross else None
        self.ffn = Mlp(hidden, hidden, inner=4 * hidden)
        self.ffn_norm = nn.LayerNorm(hidden)

    def forward(self, x_CQH: Tensor, frames_CFH: Tensor, seen_CQF: Tensor) -> Tensor:
        x_CQH = self.self_norm(x_CQH + self.self_attention(x_CQH, x_CQH))
        if self.cross_attention is not None and self.cross_norm is not None:
            x_CQH = self.cross_norm(x_CQH + self.cross_attention(x_CQH, frames_CFH, seen_CQF))
        return self.ffn_norm(x_CQH + self.ffn(x_CQH))


class QFormerConnector(OneEncoderConnector):
    """`qformer`: a fixed number of learnable queries read each clip; a GELU MLP gives their width."""

    def __init__(self, spec: Connector, encoder_width: int, width: int) -> None:
        super().__init__()
        hidden = spec.hidden_size or QFORMER_HIDDEN_SIZE
        heads = spec.num_heads or QFORMER_HEADS
        if hidden % heads:
            raise UserError("model.connector.num_heads", f"{heads} does not divide hidden_size {hidden}", "change one")
        self.queries = nn.Parameter(torch.empty(spec.num_queries, hidden))
        self.frames_in = nn.Linear(encoder_width, hidden)
        self.frames_norm = nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(
            QFormerBlock(hidden, heads, cross=index % 2 == 0) for index in range(spec.num_layers or QFORMER_LAYERS)
        )
        self.project = Mlp(hidden, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        return torch.full_like(lengths[0], len(self.queries))

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        frames = self.frames_norm(self.frames_in(features[0]))
        frames_CFH = pad_sequence(list(frames.split(lengths[0].tolist())), batch_first=True)
        seen_C1F = to_device((torch.arange(frames_CFH.shape[1]) < lengths[0][:, None])[:, None], frames.device)
        x_CQH = self.queries.expand(len(frames_CFH), -1, -1)
        for block in self.blocks:
            x_CQH = block(x_CQH, frames_CFH, seen_C1F.expand(-1, x_CQH.shape[1], -1))
        return self.project(x_CQH.flatten(0, 1))


ConnectorModule = FrameConnector | ConvConnector | QFormerConnector | LfstConnector


def build_connector(
    spec: Connector, encoder_widths: Sequence[int], encoder_grids: Sequence[Sequence[int] | None], width: int
) -> ConnectorModule:
    """The connector of a stream.

    Args:
        encoder_widths, encoder_grids: of the encoders it reads, in their order.
        width: of the audio tokens it gives.

    Raises:
        UserError: settings that do not fit each other or the encoders.
    """
    if spec.kind == "linear":
        return FrameConnector(nn.Linear(encoder_widths[0], width))
    if spec.kind == "mlp":
        return FrameConnector(Mlp(encoder_widths[0], width))
    if spec.kind == "conv":
        return ConvConnector(spec.summary_stride, encoder_widths[0], width)
    if spec.kind == "qformer":
        return QFormerConnector(spec, encoder_widths[0], width)
    return LfstConnector(spec, encoder_widths, encoder_grids, width)
