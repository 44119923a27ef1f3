"""Floating-point operations of matrix products, counted from a config: what a step must compute, on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.model.audio_streams import token_width
from pipeline.model.configuration import PalConfig
from pipeline.model.lines import clip_line
from pipeline.streams import Connector, Stream


@dataclass(frozen=True)
class RowShape:
    """One row of a batch.

    Attributes:
        system_tokens: text before the clip.
        question_tokens: text of each question with its answer; they are packed behind one clip.
        loss_tokens: of them all, those that carry loss.
        frames: of the clip in each encoder; empty for a row without audio.
    """

    system_tokens: int
    question_tokens: Sequence[int]
    loss_tokens: int
    frames: dict[str, int]


def forward_flops(config: PalConfig, row: RowShape) -> int:
    """Operations of one forward pass over one row: two for each multiply-add of a matrix product.

    Attention counts visible pairs alone, padding counts nothing, and the vocabulary only where there is loss.
    `lfst`, whose windows make a small share of the total, counts its projections.
    """
    model = config.language_model
    hidden, layers = model.hidden_size, model.num_hidden_layers
    head_dim = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    inner, kv_width = model.num_attention_heads * head_dim, model.num_key_value_heads * head_dim
    streams = config.stream_specs() if row.frames else ()
    frames = [row.frames[s.encoders[0]] for s in streams]
    counts = [token_count(s.connector, n) for s, n in zip(streams, frames, strict=True)]
    slots = clip_line(streams, tuple(counts), tuple(frames))
    summaries = [slot for slot, s in zip(slots, streams, strict=True) if s.integration == "plits"]
    in_sequence = torch.cat(summaries) if summaries else torch.empty(0)

    questions = sum(row.question_tokens)
    prefix = row.system_tokens + len(in_sequence)
    entries = prefix + questions
    pairs = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in row.question_tokens)
    per_entry = 2 * (2 * hidden * inner + 2 * hidden * kv_width + 3 * hidden * model.intermediate_size)
    total = layers * (entries * per_entry + 4 * inner * pairs) + 2 * row.loss_tokens * hidden * model.vocab_size
    for stream, count, n, slot in zip(streams, counts, frames, slots, strict=True):
        width = token_width(stream, _width(config, stream), hidden)
        total += connector_flops(stream.connector, _width(config, stream), width, n, count)
        beside = questions * count + int((slot[None, :] <= in_sequence[:, None]).sum())
        if stream.integration == "lal":
            project = 2 * (width * hidden + hidden * hidden + 2 * hidden * kv_width)
            total += len(stream.audio_layers) * (count * project + 4 * inner * beside)
        elif stream.integration == "flamingo":
            per_text = 2 * (2 * hidden * hidden + 8 * hidden * hidden)
            per_layer = entries * per_text + count * 4 * width * hidden + 4 * hidden * questions * count
            total += len(stream.audio_layers) * per_layer
    return total


def training_flops(config: PalConfig, row: RowShape) -> int:
    """Forward and backward with everything trained: three times the forward pass, less what features do not need.

    Features take no gradient, so the first projection of a connector has no second product in the backward pass.
    """
    unneeded = 0
    for stream in config.stream_specs() if row.frames else ():
        frames, spec = row.frames[stream.encoders[0]], stream.connector
        encoder_width = _width(config, stream)
        width = token_width(stream, encoder_width, config.language_model.hidden_size)
        first = {"conv": encoder_width, "qformer": spec.hidden_size or 768, "lfst": spec.hidden_size or 1024}
        unneeded += 2 * frames * encoder_width * first.get(spec.kind, width)
    return 3 * forward_flops(config, row) - unneeded


def token_count(connector: Connector, frames: int) -> int:
    """Audio tokens of a clip (`lfst`: of 96 for each 512 frames of a 64 x 8 grid)."""
    if connector.kind == "conv":
        return -(-frames // connector.summary_stride)
    if connector.kind == "qformer":
        return connector.num_queries
    return frames if connector.kind != "lfst" else -(-frames // 512) * 96


def connector_flops(connector: Connector, encoder_width: int, width: int, frames: int, tokens: int) -> int:
    """Of one clip."""
    if connector.kind == "linear":
        return 2 * frames * encoder_width * width
    if connector.kind == "conv":
        conv = connector.summary_stride * encoder_width * encoder_width
        return 2 * tokens * (conv + encoder_width * width + width * width)
    if connector.kind == "mlp":
        return 2 * frames * (encoder_width * width + width * width)
    inner = connector.hidden_size or (768 if connector.kind == "qformer" else 1024)
    depth = connector.num_layers or (12 if connector.kind == "qformer" else 3)
    blocks = depth * (tokens * 12 * inner * inner + frames * inner * inner)
    return 2 * (blocks + frames * encoder_width * inner + tokens * (inner * width + width * width))


def _width(config: PalConfig, stream: Stream) -> int:
    return config.encoder_widths[stream.encoders[0]]
