"""Bytes that a forward pass keeps for the backward pass, counted layer by layer from a config."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.streams import Connector
from pipeline.cost.flops import RowShape, first_trained_layer, head_widths, sequence_shape
from pipeline.model.attention_inputs import FLEX_FROM_KEYS
from pipeline.model.audio_streams import token_width
from pipeline.model.configuration import PalConfig
from pipeline.model.parameters import TrainableSet

FP32 = 4
LOGIT_COPIES = 3  # at its peak the loss holds log-probabilities, their gradient and that of the logits, in fp32
NORM_WIDTHS_OF_KEYS = 3  # of an audio layer's projected tokens, when the backward pass makes their keys again
CONNECTOR_WIDTHS = 18  # kept by a block of qformer or lfst: two attentions, an FFN and their norms, in inner widths


@dataclass(frozen=True)
class Activations:
    """Bytes of one row of a micro-batch.

    Attributes:
        kept: alive when the loss is computed.
        loss: the vocabulary, on top of `kept`.
        layer: what the backward pass of a layer needs beyond the layer's share of `kept`: what is computed again
            under gradient checkpointing, and gradients between its operations.
    """

    kept: int
    loss: int
    layer: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.loss, self.layer)


def activation_bytes(
    config: PalConfig,
    row: RowShape,
    *,
    element_bytes: int,
    trainable: TrainableSet = "all",
    checkpointing: bool = False,
    on_gpu: bool = True,
) -> Activations:
    """What one row of a batch keeps.

    Counted per layer and entry of width d: each norm its input in fp32 and, where its weights or those behind it are
    trained, what it gives before and after scaling; attention the queries, keys, values and output (fused kernels keep
    no scores); the FFN its gate, the gate's activation and the other half and, where trained, their product. LAL adds
    at each audio layer the projected tokens, twice, and their keys and values; the tokens themselves once.

    Args:
        element_bytes: of the model's precision.
        on_gpu: packed rows attend through FlexAttention; elsewhere every question has a copy of the keys it shares.
    """
    model, b = config.language_model, element_bytes
    hidden, layers = model.hidden_size, model.num_hidden_layers
    inner, kv = head_widths(model)
    streams = config.stream_specs() if row.frames else ()
    counts, entries, _, _ = sequence_shape(streams, row)
    questions, longest = len(row.question_tokens), max(row.question_tokens, default=0)
    prefix = entries - sum(row.question_tokens)
    packed = questions > 1

    own_trained, ffn_trained = trainable != "connector", trainable == "all"
    norm = FP32 + (2 * b if own_trained else 0)
    norm_before_ffn = FP32 + (b if own_trained else 0) + (b if ffn_trained else 0)
    per_entry = hidden * (norm + norm_before_ffn) + b * 2 * inner + FP32 * model.num_attention_heads
    per_entry += b * model.intermediate_size * (4 if ffn_trained else 3)
    unpacks = packed and not on_gpu
    # Keys as the kernel gets them: of the sequence alone, and of the audio tokens beside it.
    own_keys = questions * (prefix + longest) + prefix if unpacks else entries
    plain_layer = entries * per_entry + 2 * b * kv * own_keys + (b * inner * entries if unpacks else 0)

    audio_layers: dict[int, int] = {}
    once = masks = 0
    for stream, count in zip(streams, counts, strict=True):
        encoder_width = config.encoder_widths[stream.encoders[0]]
        width = token_width(stream, encoder_width, hidden)
        once += b * (row.frames[stream.encoders[0]] * encoder_width + count * width)
        once += _connector_bytes(stream.connector, row.frames[stream.encoders[0]], count, encoder_width, width, b)
        copies = questions + bool(prefix) if unpacks else 1
        for layer in stream.audio_layers:
            if stream.integration == "lal":
                beside = count * (2 * b * hidden + 2 * b * kv * copies)
            else:  # flamingo: two norms, queries and output, its FFN's inputs and four times wider middle; keys, values
                beside = entries * hidden * b * 12 + count * 2 * b * hidden
            audio_layers[layer] = audio_layers.get(layer, 0) + beside
    if not (on_gpu and (packed or entries + max(counts, default=0) > FLEX_FROM_KEYS)):  # FlexAttention has no mask
        kinds = {sum(n for n, s in zip(counts, streams, strict=True) if at in s.audio_layers) for at in range(layers)}
        for extra in kinds:
            if unpacks:
                masks += b * (questions * longest * (extra + prefix + longest) + prefix * (extra + prefix))
            elif extra or packed:
                masks += b * entries * (extra + entries)

    first = first_trained_layer(config) if trainable == "connector" else 0
    each = [plain_layer + audio_layers.get(layer, 0) if layer >= first else 0 for layer in range(layers)]
    gradients = b * entries * 3 * model.intermediate_size
    if any(s.integration == "lal" for s in streams):
        gradients = max(gradients, max(counts) * hidden * (FP32 + NORM_WIDTHS_OF_KEYS * b))
    once += entries * hidden * norm + masks + b * row.loss_tokens * hidden
    loss = LOGIT_COPIES * FP32 * row.loss_tokens * model.vocab_size
    if not checkpointing:
        return Activations(sum(each) + once, loss, gradients)
    return Activations(layers * entries * hidden * b + once, loss, max(each) + gradients)


def _connector_bytes(connector: Connector, frames: int, tokens: int, encoder_width: int, width: int, b: int) -> int:
    """Between features and tokens."""
    if connector.kind == "linear":
        return 0
    if connector.kind == "mlp":
        return b * frames * width
    if connector.kind == "conv":
        return b * tokens * (encoder_width + width)
    inner = connector.hidden_size or (768 if connector.kind == "qformer" else 1024)
    depth = connector.num_layers or (12 if connector.kind == "qformer" else 3)
    return b * inner * (depth * (tokens * CONNECTOR_WIDTHS + frames) + frames)
