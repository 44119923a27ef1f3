"""Floating-point operations of a model's matrix products, counted from its config; the machine does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.streams import Connector, Stream
from pipeline.model.audio_connector import Grid, block_sizes
from pipeline.model.audio_streams import token_width
from pipeline.model.configuration import PalConfig
from pipeline.model.connectors import count_audio_tokens
from pipeline.model.parameters import TrainableSet
from pipeline.model.positions import clip_positions


@dataclass(frozen=True)
class RowShape:
    """Sizes of one row of a batch.

    Attributes:
        system_tokens: text tokens before the clip.
        question_tokens: text tokens of each question with its answer; all are packed behind the same clip.
        loss_tokens: how many of the row's tokens carry loss.
        frames: frames of the clip in each encoder; empty for a row without audio.
    """

    system_tokens: int
    question_tokens: Sequence[int]
    loss_tokens: int
    frames: dict[str, int]


@dataclass(frozen=True)
class SequenceShape:
    """Audio tokens of one row, and where they are.

    Attributes:
        streams: streams of the model; none for a row without audio.
        token_counts: audio tokens of each stream.
        length: tokens in the sequence, those of audio included.
        slots: for each stream the position of its tokens within the clip; see `clip_positions`.
    """

    streams: tuple[Stream, ...]
    token_counts: tuple[int, ...]
    length: int
    slots: tuple[Tensor, ...]

    @property
    def slots_in_sequence(self) -> Tensor:
        """Slots of the audio tokens that stand in the sequence (PLITS)."""
        return _in_sequence(self.streams, self.slots)


@dataclass(frozen=True)
class Operations:
    """Operations of one forward pass over one row: two for each multiply-add of a matrix product.

    Attributes:
        scores: attention's products of queries with keys and of weights with values, which have no trained side.
        attention, ffn, vocabulary: products with the language model's own matrices.
        audio: products with matrices of the streams.
        features: share of `audio` that the first products of the connectors make; no gradient goes to their features.
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
    """Counts the operations of one forward pass over one row.

    Attention counts visible pairs only, padding counts nothing, and the vocabulary counts only where there is loss.
    Of `lfst`, whose windows make a small share of the total, only the projections count.
    """
    model = config.language_model
    hidden, layers = model.hidden_size, model.num_hidden_layers
    inner, kv_width = head_widths(model)
    sequence = sequence_shape(config, row)

    questions = sum(row.question_tokens)
    prefix = sequence.length - questions
    pairs = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in row.question_tokens)
    scores = layers * 4 * inner * pairs
    attention = layers * sequence.length * 2 * (2 * hidden * inner + 2 * hidden * kv_width)
    audio = features = 0
    in_sequence = sequence.slots_in_sequence
    for stream, count, slots in zip(sequence.streams, sequence.token_counts, sequence.slots, strict=True):
        frames, encoder_width = row.frames[stream.encoders[0]], config.encoder_widths[stream.encoders[0]]
        width = token_width(stream, encoder_width, hidden)
        audio += _connector_operations(stream.connector, (encoder_width, width), frames, count)
        features += _first_product(stream.connector, (encoder_width, width), frames)
        audio_layers = len(stream.audio_layers)
        if stream.integration == "lal":
            visible = questions * count + int((slots[None, :] <= in_sequence[:, None]).sum())
            scores += audio_layers * 4 * inner * visible
            attention += audio_layers * count * 4 * hidden * kv_width
            audio += audio_layers * count * 2 * (width * hidden + hidden * hidden)
        elif stream.integration == "flamingo":
            scores += audio_layers * 4 * hidden * questions * count
            block = sequence.length * 2 * (2 * hidden * hidden + 8 * hidden * hidden)
            audio += audio_layers * (block + count * 4 * width * hidden)
    ffn = layers * sequence.length * 6 * hidden * model.intermediate_size
    return Operations(scores, attention, ffn, 2 * row.loss_tokens * hidden * model.vocab_size, audio, features)


def head_widths(language_model: Any) -> tuple[int, int]:
    """Returns the width of all query heads together, and of all key heads together."""
    head_dim = getattr(language_model, "head_dim", None) or (
        language_model.hidden_size // language_model.num_attention_heads
    )
    return language_model.num_attention_heads * head_dim, language_model.num_key_value_heads * head_dim


def whole_time_steps(frames: int, grid: Grid) -> int:
    """Rounds frames up to whole time steps: an encoder with a grid stores all frequency bands of a step, or none."""
    return frames if grid is None else -(-frames // grid[1]) * grid[1]


def sequence_shape(config: PalConfig, row: RowShape) -> SequenceShape:
    """Counts the audio tokens of one row by the connectors' own rule, and finds their positions."""
    streams = config.stream_specs() if row.frames else ()
    counts = tuple(
        count_audio_tokens(
            stream.connector,
            [config.encoder_grids.get(name) for name in stream.encoders],
            [row.frames[name] for name in stream.encoders],
        )
        for stream in streams
    )
    slots = clip_positions(streams, counts, tuple(row.frames[stream.encoders[0]] for stream in streams))
    length = row.system_tokens + len(_in_sequence(streams, slots)) + sum(row.question_tokens)
    return SequenceShape(streams, counts, length, slots)


def _in_sequence(streams: Sequence[Stream], slots: Sequence[Tensor]) -> Tensor:
    parts = [slot for slot, stream in zip(slots, streams, strict=True) if stream.integration == "plits"]
    return torch.cat(parts) if parts else torch.empty(0)


def forward_flops(config: PalConfig, row: RowShape) -> int:
    """Counts the operations of one forward pass over one row; see `count_operations`."""
    return count_operations(config, row).total


def training_flops(config: PalConfig, row: RowShape, trainable: TrainableSet = "all") -> int:
    """Counts the operations of one forward and backward pass over one row.

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
    """Returns the first layer of a frozen language model that gradients of the audio side pass through."""
    streams = config.stream_specs()
    return min((s.audio_layers[0] if s.audio_layers else 0 for s in streams), default=0)


def _first_product(connector: Connector, widths: tuple[int, int], frames: int) -> int:
    """Operations of the first matrix product of one clip, `widths` being those of the encoder and of the tokens."""
    encoder_width, width = widths
    if connector.kind == "conv":
        width = encoder_width
    elif connector.kind in ("qformer", "lfst"):
        width = block_sizes(connector).hidden
    return 2 * frames * encoder_width * width


def _connector_operations(connector: Connector, widths: tuple[int, int], frames: int, tokens: int) -> int:
    """Operations of one clip; `widths` are those of the encoder and of the tokens."""
    encoder_width, width = widths
    if connector.kind == "linear":
        return 2 * frames * encoder_width * width
    if connector.kind == "mlp":
        return 2 * frames * (encoder_width * width + width * width)
    if connector.kind == "conv":
        conv = connector.summary_stride * encoder_width * encoder_width
        return 2 * tokens * (conv + encoder_width * width + width * width)
    sizes = block_sizes(connector)
    inner = sizes.hidden
    blocks = sizes.layers * (tokens * 12 * inner * inner + frames * inner * inner)
    return 2 * (blocks + frames * encoder_width * inner + tokens * (inner * width + width * width))
