"""Streams, of which a model consists (features -> connector -> integration at layers), and presets, which name
combinations of them. Uses only the standard library, so that the config tree and the model share one definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, get_args

from pipeline.core.errors import UserError

IntegrationKind = Literal["plits", "lal", "flamingo"]
ConnectorKind = Literal["linear", "mlp", "qformer", "lfst", "conv"]
GainTarget = Literal["keys_values", "values"]
Preset = Literal["plits", "lal", "pal_v2", "pal_v3", "delayed", "flamingo"]

DELAYED_FIRST_AUDIO_LAYER = 4  # arXiv 2506.10423 v1: audio enters from the fifth layer on
PAL_V3_FRACTION = Fraction(1, 3)  # arXiv 2506.10423 v3, section 3.3: LAL in the first third of the layers


@dataclass(frozen=True)
class Connector:
    """How audio features become audio tokens.

    Attributes:
        kind: `linear` and `mlp` map frame by frame, `conv` merges `summary_stride` frames into one token,
            `qformer` compresses to `num_queries` tokens, `lfst` reads several encoders on one time-frequency grid.
        width: width of the audio tokens. None means the width of the language model for tokens in the sequence (PLITS),
            and otherwise, where per-layer projections follow, the smaller of the encoder's and the model's width.
        summary_stride: number of frames that `conv` merges into one token.
        num_queries: number of queries of `qformer`, which is its number of tokens.
        num_layers, num_heads, hidden_size: sizes of `qformer` and `lfst`; None means the default of the kind.
    """

    kind: ConnectorKind = "mlp"
    width: int | None = None
    summary_stride: int = 1
    num_queries: int = 32
    num_layers: int | None = None
    num_heads: int | None = None
    hidden_size: int | None = None


@dataclass(frozen=True)
class Gain:
    """A learnable scale of LAL's keys and values, one number for each audio layer; see `model.gain`.

    Attributes:
        start: value before training.
        target: what is scaled; scaled keys also move the attention away from audio tokens.
    """

    start: float = 0.1
    target: GainTarget = "keys_values"


@dataclass(frozen=True)
class Stream:
    """One path from features into the language model.

    Attributes:
        encoders: encoders whose features it reads; more than one only with the `lfst` connector.
        connector: connector from features to audio tokens.
        integration: `plits` (tokens in the sequence), `lal` (keys and values in `audio_layers`) or `flamingo`
            (gated cross-attention before `audio_layers`).
        audio_layers: sorted numbers of the layers; empty for `plits`, whose tokens pass through every layer.
        summary_of: index of the stream whose frames these tokens summarise. They then share its positions: each
            summary token comes directly after the frames it covers.
        gain: scale of the keys and values of `lal`; None is the method as published.
    """

    encoders: tuple[str, ...]
    integration: IntegrationKind
    connector: Connector = field(default_factory=Connector)
    audio_layers: tuple[int, ...] = ()
    summary_of: int | None = None
    gain: Gain | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, for a saved model config."""
        return {**asdict(self), "encoders": list(self.encoders), "audio_layers": list(self.audio_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stream:
        """Inverts `to_dict`."""
        return cls(
            encoders=tuple(values["encoders"]),
            integration=values["integration"],
            connector=Connector(**values["connector"]),
            audio_layers=tuple(values["audio_layers"]),
            summary_of=values["summary_of"],
            gain=Gain(**values["gain"]) if values.get("gain") else None,  # absent in models saved before it existed
        )


@dataclass(frozen=True)
class LayerRule:
    """Which layers of a language model receive audio: an explicit list, or else a rule; see `resolve_audio_layers`.

    Attributes:
        first_audio_layer: first layer; None means the default of the preset.
        num_audio_layers: number of layers, or a fraction of the model's; None means the default of the preset.
        layer_stride: distance between two of the layers.
        audio_layers: explicit list of layers; None means the rule.
    """

    first_audio_layer: int | None = None
    num_audio_layers: int | Fraction | None = None
    layer_stride: int = 1
    audio_layers: tuple[int, ...] | None = None

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layers of a language model of `num_layers` layers.

        Raises:
            UserError: a layer does not exist.
        """
        if self.audio_layers is not None:
            return check_audio_layers(self.audio_layers, num_layers)
        return resolve_audio_layers(
            num_layers,
            first_audio_layer=self.first_audio_layer or 0,
            num_audio_layers=self.num_audio_layers,
            layer_stride=self.layer_stride,
        )


def resolve_audio_layers(
    num_layers: int,
    *,
    first_audio_layer: int = 0,
    num_audio_layers: int | Fraction | None = None,
    layer_stride: int = 1,
) -> tuple[int, ...]:
    """Returns the layers that receive audio: `first_audio_layer + i * layer_stride` for i < num_audio_layers.

    Args:
        num_layers: number of layers of the language model.
        first_audio_layer: first layer that receives audio (the start of the "injection depth").
        num_audio_layers: number of layers that receive audio; a Fraction means max(1, floor(fraction * num_layers)),
            None means as many as fit.
        layer_stride: distance between two layers that receive audio (the "injection stride").

    Raises:
        UserError: the rule results in a layer that the model does not have.
    """
    if isinstance(num_audio_layers, Fraction):
        count = max(1, math.floor(num_audio_layers * num_layers))
    elif num_audio_layers is None:
        count = len(range(first_audio_layer, num_layers, layer_stride))
    else:
        count = num_audio_layers
    last = first_audio_layer + (count - 1) * layer_stride
    if count < 1 or first_audio_layer < 0 or layer_stride < 1 or last >= num_layers:
        raise UserError(
            "model.audio_layers",
            f"first_audio_layer={first_audio_layer}, num_audio_layers={count}, layer_stride={layer_stride} need "
            f"layer {last} of a language model whose layers are 0 to {num_layers - 1}",
            "lower first_audio_layer, num_audio_layers or layer_stride",
        )
    return tuple(range(first_audio_layer, last + 1, layer_stride))


def check_audio_layers(audio_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Returns an explicit list of layers as a tuple.

    Raises:
        UserError: the list is empty, not ascending, or goes beyond the language model.
    """
    layers = tuple(audio_layers)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
        raise UserError(
            "model.audio_layers",
            f"{list(layers)} is not an ascending list of layers, and the model's layers are 0 to {num_layers - 1}",
            "list layers of the model, each once and in order",
        )
    return layers


def preset_streams(
    preset: Preset,
    encoders: Sequence[str],
    num_layers: int,
    *,
    connector: Connector,
    layers: LayerRule = LayerRule(),
    summary_stride: int = 3,
) -> tuple[Stream, ...]:
    """Returns the streams of a preset (arXiv 2506.10423; `delayed` is its v1, `pal_v2` its v2, `pal_v3` its v3).

    Args:
        encoders: `pal_v2` puts the first one into the sequence (Whisper) and the others (SSLAM, CLAP) into LAL;
            `delayed`, `lal`, `plits` and `flamingo` have one stream per encoder, in the order listed (one stream for
            all of them if the connector is `lfst`); `pal_v3` has exactly one encoder.
        num_layers: number of layers of the language model.
        connector: connector of the full-resolution stream; the summary stream of `pal_v3` always uses `conv`.
        layers: layers that receive audio, except in streams of `plits`.
        summary_stride: number of frames in one summary token of `pal_v3`.

    Raises:
        UserError: the encoders do not suit the preset, or the layers do not fit the model.
    """
    if not encoders:
        raise UserError("model.encoders", "is empty", "name at least one encoder of the feature set")
    if preset == "pal_v3" and len(encoders) != 1:
        raise UserError("model.encoders", f"pal_v3 reads one encoder, got {len(encoders)}", "name exactly one")
    if preset == "pal_v2" and len(encoders) < 2:
        raise UserError(
            "model.encoders",
            "pal_v2 needs one encoder for the sequence and at least one for LAL",
            "name two or more",
        )
    if preset == "delayed" and layers.first_audio_layer is None:
        layers = replace(layers, first_audio_layer=DELAYED_FIRST_AUDIO_LAYER)
    if preset == "pal_v3" and layers.num_audio_layers is None:
        layers = replace(layers, num_audio_layers=PAL_V3_FRACTION)

    def stream(names: Sequence[str], integration: IntegrationKind) -> tuple[Stream, ...]:
        audio_layers = () if integration == "plits" else layers.resolve(num_layers)
        groups = [tuple(names)] if connector.kind == "lfst" else [(name,) for name in names]
        return tuple(Stream(group, integration, connector, audio_layers) for group in groups)

    if preset == "plits":
        return stream(encoders, "plits")
    if preset in ("lal", "delayed"):
        return stream(encoders, "lal")
    if preset == "flamingo":
        return stream(encoders, "flamingo")
    if preset == "pal_v3":
        summary = Connector(kind="conv", summary_stride=summary_stride)
        return (*stream(encoders, "lal"), Stream((encoders[0],), "plits", summary, summary_of=0))
    if preset == "pal_v2":
        sequence = replace(connector, kind="mlp", width=None) if connector.kind == "lfst" else connector
        return (*stream(encoders[1:], "lal"), Stream((encoders[0],), "plits", replace(sequence, width=None)))
    raise UserError("model.integration", f"unknown preset '{preset}'", f"choose from {', '.join(get_args(Preset))}")


def with_gain(streams: Sequence[Stream], gain: Gain | None) -> tuple[Stream, ...]:
    """Returns the streams, those of `lal` with this gain."""
    return tuple(replace(stream, gain=gain) if stream.integration == "lal" else stream for stream in streams)


def check_streams(streams: Sequence[Stream], num_layers: int) -> tuple[Stream, ...]:
    """Returns the streams after checking them against each other and a language model of `num_layers` layers.

    Raises:
        UserError: a layer does not exist, a summary refers to a stream that does not exist, or a connector that reads
            one encoder has several.
    """
    for index, stream in enumerate(streams):
        where = f"model.streams.{index}"
        if stream.integration != "plits":
            check_audio_layers(stream.audio_layers, num_layers)
        elif stream.audio_layers:
            raise UserError(
                f"{where}.audio_layers", "has no effect on plits", "remove it: plits tokens pass through every layer"
            )
        if stream.gain is not None and stream.integration != "lal":
            raise UserError(f"{where}.gain", f"has no effect on {stream.integration}", "remove it")
        if len(stream.encoders) > 1 and stream.connector.kind != "lfst":
            raise UserError(
                f"{where}.encoders",
                f"'{stream.connector.kind}' reads a single encoder",
                "use lfst, or name one encoder",
            )
        source = stream.summary_of
        if source is None:
            continue
        if source >= len(streams) or source == index or streams[source].encoders != stream.encoders:
            raise UserError(
                f"{where}.summary_of",
                f"stream {source} is not another stream of the same encoder",
                "give the index of the stream that is summarised",
            )
        if streams[source].connector.kind == "qformer":
            raise UserError(
                f"model.streams.{source}.connector",
                "a query of 'qformer' covers no particular frames, so a summary has no position after its frames",
                "use linear, mlp or conv for a stream that is summarised",
            )
    return tuple(streams)
