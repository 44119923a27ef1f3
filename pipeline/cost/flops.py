"""Floating-point operations of matrix products, counted from a config: what a step must compute, on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.streams import Connector, Stream
from pipeline.model.audio_streams import token_width
from pipeline.model.configuration import PalConfig
from pipeline.model.parameters import TrainableSet
from pipeline.model.positions import clip_positions


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


@dataclass(frozen=True)
class Operations:
    """Operations of one forward pass over one row: two for each multiply-add of a matrix product.

    Attributes:
        scores: of attention, queries with keys and weights with values; these products have no trained side.
        attention, ffn, vocabulary: products with the language model's own matrices.
        audio: products with matrices of the streams.
        features: of `audio`, the first products of connectors, whose other side takes no gradient.
    """

    scores: int
    attention: int
    ffn: int
    vocabulary: int
    audio: int
    features: int

    @property
    def total(self) -> int:
        return self.scores + self.attention + self.ffn + self.vocabulary + self.audio


def count_operations(config: PalConfig, row: RowShape) -> Operations:
    """What one row costs.

    Attention counts visible pairs alone, padding counts nothing, and the vocabulary only where there is loss.
    `lfst`, whose windows make a small share of the total, counts its projections.
    """
    model = config.language_model
    hidden, layers = model.hidden_size, model.num_hidden_layers
    inner, kv_width = head_widths(model)
    streams = config.stream_specs() if row.frames else ()
    counts, entries, in_sequence, slots = sequence_shape(streams, row)

    questions = sum(row.question_tokens)
    prefix = entries - questions
    pairs = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in row.question_tokens)
    scores = layers * 4 * inner * pairs
    attention = layers * entries * 2 * (2 * hidden * inner + 2 * hidden * kv_width)
    audio = features = 0
    for stream, count, slot in zip(streams, counts, slots, strict=True):
        encoder_width, n = _width(config, stream), row.frames[stream.encoders[0]]
        width = token_width(stream, encoder_width, hidden)
        audio += connector_flops(stream.connector, encoder_width, width, n, count)
        features += _first_product(stream.connector, encoder_width, width, n)
        on = len(stream.audio_layers)
        if stream.integration == "lal":
            beside = questions * count + int((slot[None, :] <= in_sequence[:, None]).sum())
            scores += on * 4 * inner * beside
            attention += on * count * 4 * hidden * kv_width
            audio += on * count * 2 * (width * hidden + hidden * hidden)
        elif stream.integration == "flamingo":
            scores += on * 4 * hidden * questions * count
            audio += on * (entries * 2 * (2 * hidden * hidden + 8 * hidden * hidden) + count * 4 * width * hidden)
    ffn = layers * entries * 6 * hidden * model.intermediate_size
    return Operations(scores, attention, ffn, 2 * row.loss_tokens * hidden * model.vocab_size, audio, features)


def head_widths(language_model: Any) -> tuple[int, int]:
    """Width of all query heads together, and of all key heads."""
    head_dim = getattr(language_model, "head_dim", None) or (
        language_model.hidden_size // language_model.num_attention_heads
    )
    return language_model.num_attention_heads * head_dim, language_model.num_key_value_heads * head_dim


def sequence_shape(streams: Sequence[Stream], row: RowShape) -> tuple[list[int], int, Tensor, tuple[Tensor, ...]]:
    """Audio tokens of each stream, entries of the row's sequence, slots of those that are audio, slots of each stream
    (see `clip_positions`)."""
    frames = [row.frames[s.encoders[0]] for s in streams]
    counts = [token_count(s.connector, n) for s, n in zip(streams, frames, strict=True)]
    slots = clip_positions(tuple(streams), tuple(counts), tuple(frames))
    summaries = [slot for slot, s in zip(slots, streams, strict=True) if s.integration == "plits"]
    in_sequence = torch.cat(summaries) if summaries else torch.empty(0)
    return counts, row.system_tokens + len(in_sequence) + sum(row.question_tokens), in_sequence, slots


def forward_flops(config: PalConfig, row: RowShape) -> int:
    """Operations of one forward pass over one row; see `count_operations`."""
    return count_operations(config, row).total


def training_flops(config: PalConfig, row: RowShape, trainable: TrainableSet = "all") -> int:
    """Operations of one forward and backward pass over one row.

    The backward pass has one product for the gradient of each input and one for that of each trained matrix.
    Features take no gradient; nor does anything below the first audio layer of a frozen language model. Adapters
    (LoRA) are too narrow to count.
    """
    count = count_operations(config, row)
    inputs = count.total - count.features + count.scores  # scores have two
    if trainable == "connector":
        passed = 2 * count.scores + count.attention + count.ffn
        below = passed * first_trained_layer(config) // config.language_model.num_hidden_layers
        return count.total + inputs - below + count.audio
    ffn = count.ffn if trainable == "all" else 0
    return count.total + inputs + count.attention + ffn + count.vocabulary + count.audio


def first_trained_layer(config: PalConfig) -> int:
    """The first layer of a frozen language model that gradients of the audio side pass through."""
    streams = config.stream_specs()
    return min((s.audio_layers[0] if s.audio_layers else 0 for s in streams), default=0)


def _first_product(connector: Connector, encoder_width: int, width: int, frames: int) -> int:
    first = {"conv": encoder_width, "qformer": connector.hidden_size or 768, "lfst": connector.hidden_size or 1024}
    return 2 * frames * encoder_width * first.get(connector.kind, width)


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
