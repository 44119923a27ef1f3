"""The saved configuration of a model: a language model plus streams, with explicit layers and widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from pipeline.core.errors import UserError
from pipeline.core.streams import Stream


class PalConfig(PretrainedConfig):
    """Configuration of `PalForCausalLM`.

    Args:
        language_model_config: config of the language model, or its dict.
        streams: the streams, or their dicts (`Stream.to_dict`), with explicit `audio_layers`.
        encoder_widths: width of each encoder's features.
        audio_token_id: id of the placeholder in `input_ids`; one for each clip, never embedded.
        encoder_grids: (time, frequency) cells per window of encoders that the `lfst` connector reads.
        norm_audio_tokens: apply the layer's own input norm to the projected audio tokens of LAL.
        system_text_sees_audio: lift the position rule for text queries and audio keys.
        audio_queries: ablation; audio tokens also attend to the audio of their clip.
        feature_fingerprints: encoder name -> fingerprint of the features that the model was trained on.
        base_language_model: folder or Hub name that the language model's weights come from; None if random.
        lora: rank, alpha, dropout and target_modules of adapters on the language model; None for none.
    """

    model_type = "pal"
    sub_configs = {"language_model_config": AutoConfig}

    def __init__(
        self,
        language_model_config: PretrainedConfig | dict[str, Any] | None = None,
        streams: Sequence[Stream | dict[str, Any]] = (),
        encoder_widths: dict[str, int] | None = None,
        audio_token_id: int = 0,
        encoder_grids: dict[str, Sequence[int]] | None = None,
        norm_audio_tokens: bool = True,
        system_text_sees_audio: bool = False,
        audio_queries: bool = False,
        feature_fingerprints: dict[str, str] | None = None,
        base_language_model: str | None = None,
        lora: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if language_model_config is None:  # transformers builds a default config, to save only what differs from it
            language_model_config = CONFIG_MAPPING["llama"]()
        elif isinstance(language_model_config, dict):
            language_model_config = CONFIG_MAPPING[language_model_config["model_type"]](**language_model_config)
        self.language_model_config = language_model_config
        self.streams = [s.to_dict() if isinstance(s, Stream) else s for s in streams]
        self.encoder_widths = dict(encoder_widths or {})
        self.audio_token_id = audio_token_id
        self.encoder_grids = {name: list(grid) for name, grid in (encoder_grids or {}).items()}
        self.norm_audio_tokens = norm_audio_tokens
        self.system_text_sees_audio = system_text_sees_audio
        self.audio_queries = audio_queries
        self.feature_fingerprints = dict(feature_fingerprints or {})
        self.base_language_model = base_language_model
        self.lora = lora
        kwargs["tie_word_embeddings"] = False  # the language model ties its own
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Returns the language model's config, where transformers' generation reads sizes and token ids."""
        return self.language_model_config

    @property
    def language_model(self) -> Any:
        """`language_model_config`, which is always a config object after `__init__`."""
        return self.language_model_config

    def stream_specs(self) -> tuple[Stream, ...]:
        """Returns the streams as `Stream` objects.

        Raises:
            UserError: a stream reads an encoder that `encoder_widths` lacks.
        """
        streams = tuple(Stream.from_dict(s) for s in self.streams)
        for stream in streams:
            for name in stream.encoders:
                if name not in self.encoder_widths:
                    raise UserError(
                        "encoder_widths",
                        f"has no width for encoder '{name}' of a stream, only for {sorted(self.encoder_widths)}",
                        "give the width of its features",
                    )
        return streams
