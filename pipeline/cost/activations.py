"""Bytes that a forward pass saves for the backward pass, counted layer by layer from a config."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.streams import Stream
from pipeline.cost.flops import RowShape, SequenceShape, first_trained_layer, head_widths, sequence_shape
from pipeline.model.attention_inputs import FLEX_FROM_KEYS
from pipeline.model.audio_connector import block_sizes
from pipeline.model.audio_streams import token_width
from pipeline.model.configuration import PalConfig
from pipeline.model.parameters import TrainableSet

FP32 = 4
LOGIT_COPIES = 3  # at its peak the loss holds log-probabilities, their gradient and that of the logits, in fp32
NORM_WIDTHS_OF_KEYS = 3  # of an audio layer's projected tokens, when the backward pass recomputes their keys
CONNECTOR_WIDTHS = 18  # saved by a block of qformer or lfst: two attentions, an FFN and their norms, in inner widths
FLAMINGO_WIDTHS = 12  # saved by a flamingo block: two norms, queries and output, the FFN's input and its middle


@dataclass(frozen=True)
class Execution:
    """How a forward and backward pass runs, as far as its memory depends on it.

    Attributes:
        element_bytes: bytes of one element in the model's precision.
        trainable: which parameters are trained.
        checkpointing: whether the backward pass recomputes each layer.
        on_gpu: on a GPU, packed rows attend through FlexAttention; elsewhere every question has a copy of the keys
            that it shares with others.
    """

    element_bytes: int
    trainable: TrainableSet = "all"
    checkpointing: bool = False
    on_gpu: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes of one row of a micro-batch.

    Attributes:
        saved: bytes saved for the backward pass, all alive when the loss is computed.
        loss: bytes of the logits and what the loss makes of them, on top of `saved`.
        layer: bytes that the backward pass of one layer needs beyond the layer's share of `saved`: what gradient
            checkpointing recomputes, and gradients between its operations.
    """

    saved: int
    loss: int
    layer: int

    @property
    def peak(self) -> int:
        return self.saved + max(self.loss, self.layer)


@dataclass(frozen=True)
class _PackedRow:
    """Sizes of one row that keys and masks follow from; `unpacks` where every question has its own copy of the keys."""

    length: int
    prefix: int
    questions: int
    longest_question: int
    unpacks: bool

    @property
    def is_packed(self) -> bool:
        return self.questions > 1

    @property
    def keys(self) -> int:
        """Keys of the sequence itself, as the attention operation receives them."""
        return self.questions * (self.prefix + self.longest_question) + self.prefix if self.unpacks else self.length


def activation_bytes(config: PalConfig, row: RowShape, execution: Execution) -> Activations:
    """Counts what one row of a batch saves for its backward pass.

    Counted per layer and token of width d: each norm keeps its input in fp32 and, where its weights or those behind
    it are trained, its output before and after scaling; attention keeps queries, keys, values and output (fused
    operations keep no scores); the FFN keeps its gate, the gate's activation, the other half and, where trained, their
    product. LAL adds at each audio layer the projected tokens, twice, with their keys and values. The audio tokens
    themselves count once.
    """
    model, b = config.language_model, execution.element_bytes
    hidden, layers = model.hidden_size, model.num_hidden_layers
    sequence = sequence_shape(config, row)
    length, questions = sequence.length, len(row.question_tokens)
    packed = _PackedRow(
        length=length,
        prefix=length - sum(row.question_tokens),
        questions=questions,
        longest_question=max(row.question_tokens, default=0),
        unpacks=questions > 1 and not execution.on_gpu,
    )
    audio_layers: dict[int, int] = {}
    once = _mask_bytes(sequence, packed, execution, layers)
    for stream, count in zip(sequence.streams, sequence.token_counts, strict=True):
        once += _audio_token_elements(config, stream, row.frames[stream.encoders[0]], count) * b
        for layer in stream.audio_layers:
            audio_layers[layer] = audio_layers.get(layer, 0) + _audio_layer_bytes(config, stream, count, packed, b)

    plain = _layer_bytes(config, packed, execution)
    first = first_trained_layer(config) if execution.trainable == "connector" else 0
    per_layer = [plain + audio_layers.get(layer, 0) if layer >= first else 0 for layer in range(layers)]
    gradients = b * length * 3 * model.intermediate_size
    if any(stream.integration == "lal" for stream in sequence.streams):
        gradients = max(gradients, max(sequence.token_counts) * hidden * (FP32 + NORM_WIDTHS_OF_KEYS * b))
    once += length * hidden * _norm_bytes(execution) + b * row.loss_tokens * hidden
    loss = LOGIT_COPIES * FP32 * row.loss_tokens * model.vocab_size
    if not execution.checkpointing:
        return Activations(sum(per_layer) + once, loss, gradients)
    return Activations(layers * length * hidden * b + once, loss, max(per_layer) + gradients)


def _norm_bytes(execution: Execution) -> int:
    return FP32 + (2 * execution.element_bytes if execution.trainable != "connector" else 0)


def _layer_bytes(config: PalConfig, packed: _PackedRow, execution: Execution) -> int:
    """Bytes of a layer of the language model without audio beside the sequence."""
    model, b = config.language_model, execution.element_bytes
    inner, kv = head_widths(model)
    ffn_trained = execution.trainable == "all"
    norm_before_ffn = FP32 + (b if execution.trainable != "connector" else 0) + (b if ffn_trained else 0)
    per_token = model.hidden_size * (_norm_bytes(execution) + norm_before_ffn)
    per_token += b * 2 * inner + FP32 * model.num_attention_heads
    per_token += b * model.intermediate_size * (4 if ffn_trained else 3)
    queries_again = b * inner * packed.length if packed.unpacks else 0
    return packed.length * per_token + 2 * b * kv * packed.keys + queries_again


def _audio_layer_bytes(config: PalConfig, stream: Stream, tokens: int, packed: _PackedRow, b: int) -> int:
    """Bytes that a stream adds to one of its audio layers."""
    hidden = config.language_model.hidden_size
    if stream.integration == "lal":
        _, kv = head_widths(config.language_model)
        copies = packed.questions + bool(packed.prefix) if packed.unpacks else 1
        return tokens * (2 * b * hidden + 2 * b * kv * copies)
    return packed.length * hidden * b * FLAMINGO_WIDTHS + tokens * 2 * b * hidden


def _mask_bytes(sequence: SequenceShape, packed: _PackedRow, execution: Execution, layers: int) -> int:
    """Bytes of attention masks: one for each number of audio tokens that a layer attends to beside the sequence."""
    length, longest, prefix = packed.length, packed.longest_question, packed.prefix
    if execution.on_gpu and (packed.is_packed or length + max(sequence.token_counts, default=0) > FLEX_FROM_KEYS):
        return 0  # FlexAttention has no mask
    pairs = list(zip(sequence.token_counts, sequence.streams, strict=True))
    elements = 0
    for beside in {sum(n for n, stream in pairs if layer in stream.audio_layers) for layer in range(layers)}:
        if packed.unpacks:
            elements += packed.questions * longest * (beside + prefix + longest) + prefix * (beside + prefix)
        elif beside or packed.is_packed:
            elements += length * (beside + length)
    return execution.element_bytes * elements


def _audio_token_elements(config: PalConfig, stream: Stream, frames: int, tokens: int) -> int:
    """Elements of a stream's features and tokens, and of what its connector keeps between them."""
    connector, encoder_width = stream.connector, config.encoder_widths[stream.encoders[0]]
    width = token_width(stream, encoder_width, config.language_model.hidden_size)
    elements = frames * encoder_width + tokens * width
    if connector.kind == "linear":
        return elements
    if connector.kind == "mlp":
        return elements + frames * width
    if connector.kind == "conv":
        return elements + tokens * (encoder_width + width)
    sizes = block_sizes(connector)
    return elements + sizes.hidden * (sizes.layers * (tokens * CONNECTOR_WIDTHS + frames) + frames)
