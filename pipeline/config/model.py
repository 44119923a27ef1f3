"""The `model` section of an experiment: a language model plus streams, and how settings become explicit streams."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.fields import LayerCount, NonNegativeInt, PositiveInt
from pipeline.config.loading import InvalidConfig, Strict
from pipeline.core.errors import UserError
from pipeline.core.streams import (
    Connector,
    ConnectorKind,
    IntegrationKind,
    Preset,
    Stream,
    check_streams,
    preset_streams,
)


class ConnectorConfig(Strict):
    """See `pipeline.core.streams.Connector`."""

    kind: ConnectorKind = "mlp"
    width: PositiveInt | None = None
    summary_stride: PositiveInt = 1
    num_queries: PositiveInt = 32
    num_layers: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    hidden_size: PositiveInt | None = None

    def spec(self) -> Connector:
        return Connector(**self.model_dump())


class StreamConfig(Strict):
    """One stream of a custom integration; see `pipeline.core.streams.Stream`."""

    encoders: list[str] = Field(min_length=1)
    integration: IntegrationKind
    connector: ConnectorConfig = ConnectorConfig()
    audio_layers: list[NonNegativeInt] = []
    summary_of: NonNegativeInt | None = None


class ModelConfig(Strict):
    """A language model plus streams.

    Attributes:
        language_model: a Hugging Face folder or Hub name.
        encoders: feature columns read, in the order the preset expects.
        integration: a preset, or `custom` with explicit `streams`.
        first_audio_layer, num_audio_layers, layer_stride: the rule for audio_layers; num_audio_layers may be a
            fraction of the layers ("1/3").
        audio_layers: an explicit list instead of the rule.
        summary_stride: frames merged into one summary token of `pal_v3`.
        norm_audio_tokens: apply the layer's own input norm to the projected audio tokens.
        system_text_sees_audio: lift the position rule for text before the audio.
        audio_queries: ablation; audio tokens also query the audio of their clip.
    """

    language_model: str
    encoders: list[str] = Field(default=["log_mel"], min_length=1)
    integration: Preset | Literal["custom"] = "lal"
    streams: list[StreamConfig] | None = None
    connector: ConnectorConfig = ConnectorConfig()
    first_audio_layer: NonNegativeInt | None = None
    num_audio_layers: LayerCount = None
    layer_stride: PositiveInt = 1
    audio_layers: list[NonNegativeInt] | None = None
    summary_stride: PositiveInt = 3
    norm_audio_tokens: bool = True
    system_text_sees_audio: bool = False
    audio_queries: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.integration == "custom") != (self.streams is not None):
            raise InvalidConfig("model.streams", "goes with integration: custom, and only with it", "set both")
        rule = (self.first_audio_layer, self.num_audio_layers, self.layer_stride)
        if self.audio_layers is not None and rule != (None, None, 1):
            raise InvalidConfig(
                "model.audio_layers",
                "is given beside first_audio_layer, num_audio_layers or layer_stride",
                "give the list or the rule",
            )
        return self

    def resolve_streams(self, num_layers: int) -> tuple[Stream, ...]:
        """The explicit streams for a language model of `num_layers` layers.

        Raises:
            UserError: a layer that the model does not have, encoders that do not suit the preset, or a setting that
                these streams make nothing of.
        """
        if self.integration == "custom":
            streams = tuple(
                Stream(tuple(s.encoders), s.integration, s.connector.spec(), tuple(s.audio_layers), s.summary_of)
                for s in self.streams or []
            )
        else:
            streams = preset_streams(
                self.integration,
                self.encoders,
                num_layers,
                connector=self.connector.spec(),
                summary_stride=self.summary_stride,
                first_audio_layer=self.first_audio_layer,
                num_audio_layers=self.num_audio_layers,
                layer_stride=self.layer_stride,
                audio_layers=None if self.audio_layers is None else tuple(self.audio_layers),
            )
        self._refuse_dead_settings(streams)
        return check_streams(streams, num_layers)

    def _refuse_dead_settings(self, streams: tuple[Stream, ...]) -> None:
        kinds = {stream.integration for stream in streams}
        rule = ("first_audio_layer", "num_audio_layers", "layer_stride", "audio_layers")
        needs = {name: self.integration != "custom" and kinds != {"plits"} for name in rule}
        needs |= dict.fromkeys(("audio_queries", "norm_audio_tokens"), "lal" in kinds)
        needs["summary_stride"] = self.integration == "pal_v3"
        for name, has_effect in needs.items():
            if not has_effect and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"model.{name}", f"has no effect on integration '{self.integration}'", "remove this setting"
                )
