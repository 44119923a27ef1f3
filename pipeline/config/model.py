"""The `model` section of an experiment: a language model plus streams. Resolves presets to explicit streams."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import LayerCount, NonNegativeFloat, NonNegativeInt, PositiveInt
from pipeline.config.loading import InvalidConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Strict
from pipeline.core.streams import (
    Connector,
    ConnectorKind,
    Gain,
    GainTarget,
    IntegrationKind,
    LayerRule,
    Preset,
    Stream,
    check_streams,
    preset_streams,
    with_gain,
)


class ConnectorConfig(Strict):
    """Settings of a connector; see `pipeline.core.streams.Connector`."""

    kind: ConnectorKind = "mlp"
    width: PositiveInt | None = None
    summary_stride: PositiveInt = 1
    num_queries: PositiveInt = 32
    num_layers: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    hidden_size: PositiveInt | None = None

    def spec(self) -> Connector:
        return Connector(**self.model_dump())


class GainConfig(Strict):
    """Settings of a gain; see `pipeline.core.streams.Gain`."""

    start: NonNegativeFloat = 0.1
    target: GainTarget = "keys_values"

    def spec(self) -> Gain:
        return Gain(**self.model_dump())


class StreamConfig(Strict):
    """One stream of a custom integration; see `pipeline.core.streams.Stream`."""

    encoders: list[str] = Field(min_length=1)
    integration: IntegrationKind
    connector: ConnectorConfig = ConnectorConfig()
    audio_layers: list[NonNegativeInt] = []
    summary_of: NonNegativeInt | None = None
    gain: GainConfig | None = None


class ModelConfig(Strict):
    """A language model plus streams.

    Attributes:
        language_model: folder in the Hugging Face format, or name on the Hub.
        encoders: encoders whose features the model reads, in the order that the preset expects; empty for a language
            model alone, which is trained on text.
        integration: a preset, `custom` with explicit `streams`, or `none` if and only if there are no encoders. Each of
            the two follows from the other where it is left out.
        streams: the streams of a `custom` integration.
        connector: connector of every stream of a preset.
        first_audio_layer, num_audio_layers, layer_stride: the rule for audio_layers; num_audio_layers may be a
            fraction of the layers ("1/3").
        audio_layers: explicit list of layers, instead of the rule.
        summary_stride: number of frames that `pal_v3` merges into one summary token.
        norm_audio_tokens: apply the layer's own input norm to the projected audio tokens.
        gain: learnable scale of the keys and values of LAL in each audio layer, so that a pretrained language model
            begins close to itself; null is the method as published. Presets without LAL ignore it, and the streams of a
            `custom` integration have their own.
        system_text_sees_audio: let the system prompt, which precedes the audio, attend to it.
        audio_queries: ablation in which audio tokens also attend to the audio of their clip.
    """

    language_model: str
    encoders: list[str] = ["log_mel"]
    integration: Preset | Literal["custom", "none"] = "lal"
    streams: list[StreamConfig] | None = Field(default=None, min_length=1)
    connector: ConnectorConfig = ConnectorConfig()
    first_audio_layer: NonNegativeInt | None = None
    num_audio_layers: LayerCount = None
    layer_stride: PositiveInt = 1
    audio_layers: list[NonNegativeInt] | None = None
    summary_stride: PositiveInt = 3
    norm_audio_tokens: bool = True
    gain: GainConfig | None = None
    system_text_sees_audio: bool = False
    audio_queries: bool = False

    @model_validator(mode="before")
    @classmethod
    def _complete_text_only(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("integration") == "none" and "encoders" not in values:
                return {**values, "encoders": []}
            if values.get("encoders") in ([], {}) and "integration" not in values:
                return {**values, "encoders": [], "integration": "none"}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.text_only and self.encoders:
            raise InvalidConfig(
                "model.encoders", "has no effect on integration 'none'", "set it to [], or choose an integration"
            )
        if not self.text_only and not self.encoders:
            raise InvalidConfig(
                "model.encoders",
                f"is empty, and integration '{self.integration}' reads audio",
                "name an encoder of the feature set, or set model.integration to none to train on text alone",
            )
        if (self.integration == "custom") != (self.streams is not None):
            raise InvalidConfig(
                "model.streams", "must be set if and only if integration is custom", "set both or neither"
            )
        rule = (self.first_audio_layer, self.num_audio_layers, self.layer_stride)
        if self.audio_layers is not None and rule != (None, None, 1):
            raise InvalidConfig(
                "model.audio_layers",
                "excludes first_audio_layer, num_audio_layers and layer_stride",
                "give either the list or the rule",
            )
        return self

    @property
    def text_only(self) -> bool:
        """Whether the model is a language model alone, without any stream."""
        return self.integration == "none"

    def resolve_streams(self, num_layers: int) -> tuple[Stream, ...]:
        """Returns the explicit streams for a language model of `num_layers` layers.

        Raises:
            UserError: a layer is beyond the model, the encoders do not suit the preset, or a setting has no effect on
                these streams.
        """
        if self.integration == "none":
            streams: tuple[Stream, ...] = ()
        elif self.integration == "custom":
            streams = tuple(
                Stream(
                    tuple(s.encoders),
                    s.integration,
                    s.connector.spec(),
                    tuple(s.audio_layers),
                    s.summary_of,
                    None if s.gain is None else s.gain.spec(),
                )
                for s in self.streams or []
            )
        else:
            streams = preset_streams(
                self.integration,
                self.encoders,
                num_layers,
                connector=self.connector.spec(),
                layers=LayerRule(
                    self.first_audio_layer,
                    self.num_audio_layers,
                    self.layer_stride,
                    None if self.audio_layers is None else tuple(self.audio_layers),
                ),
                summary_stride=self.summary_stride,
            )
            streams = with_gain(streams, None if self.gain is None else self.gain.spec())
        self._refuse_dead_settings(streams)
        return check_streams(streams, num_layers)

    def _refuse_dead_settings(self, streams: tuple[Stream, ...]) -> None:
        kinds = {stream.integration for stream in streams}
        rule = ("first_audio_layer", "num_audio_layers", "layer_stride", "audio_layers")
        needs = {name: self.integration != "custom" and not kinds <= {"plits"} for name in rule}
        needs |= dict.fromkeys(("audio_queries", "norm_audio_tokens"), "lal" in kinds)
        needs["summary_stride"] = self.integration == "pal_v3"
        needs["gain"] = self.integration != "custom"  # recipes set it for every preset
        needs |= dict.fromkeys(("connector", "system_text_sees_audio"), not self.text_only)
        for name, has_effect in needs.items():
            if not has_effect and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"model.{name}", f"has no effect on integration '{self.integration}'", "remove this setting"
                )
