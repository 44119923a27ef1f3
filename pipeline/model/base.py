"""`PalModel`: a language model of transformers, the audio streams, and what prepares their forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.core.streams import check_streams
from pipeline.model.attention import ATTENTION_NAME, flamingo_hook
from pipeline.model.attention_inputs import AttentionInputs, AttentionPath
from pipeline.model.audio_kv import AudioKV, PositionedKV
from pipeline.model.audio_streams import AudioStream, AudioTokens, initialise, run_connectors
from pipeline.model.configuration import PalConfig
from pipeline.model.families import audio_embedding_scale, family_of
from pipeline.model.layout import BatchClips, Layout, TextBatch, build_layout
from pipeline.model.lora import adapt


@dataclass(frozen=True)
class ForwardInputs:
    """What the language model reads in a forward pass over a batch.

    Attributes:
        layout: layout of the batch, on the model's device.
        embeddings: (B, T, D) text embeddings, with the tokens of PLITS at their entries.
        position_ids: (B, T); 0 at padding.
        attention_inputs: what attention reads in every layer.
    """

    layout: Layout
    embeddings: Tensor
    position_ids: Tensor
    attention_inputs: AttentionInputs


class PalModel(PreTrainedModel):
    """The modules of `PalForCausalLM`, and the steps before its forward pass, which training and decoding share.

    Args:
        config: what to build.
        language_model: a loaded language model to use; None builds one with random weights.

    Raises:
        UserError: an unsupported family, layers beyond the model, or streams that cannot be built.
    """

    config_class = PalConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    config: PalConfig

    def __init__(self, config: PalConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        family_of(config.language_model_config)
        self.specs = check_streams(config.stream_specs(), config.language_model.num_hidden_layers)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(
                config.language_model_config, attn_implementation=ATTENTION_NAME
            )
        if config.lora is not None:
            adapt(language_model, config.lora)
        self.language_model = language_model
        self.attention_path: AttentionPath = "auto"
        # transformers 4 resets it on the nested config when it builds the outer one
        language_model.set_attn_implementation(ATTENTION_NAME)
        self.audio_streams = [AudioStream(spec, config) for spec in self.specs]
        self.streams = nn.ModuleList(self.audio_streams)
        for layer in sorted({n for s in self.specs if s.integration == "flamingo" for n in s.audio_layers}):
            language_model.model.layers[layer].register_forward_pre_hook(flamingo_hook, with_kwargs=True)
        self._stream_names = {module: name for name, module in self.streams.named_modules(prefix="streams")}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules without saved weights; the language model initialises its own.
        if module in self._stream_names:
            initialise(module, self._stream_names[module])

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes each layer in the backward pass, including the projections of its audio.

        Never reentrant: the reentrant form drops gradients of tensors that travel by keyword.
        """
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        self.language_model.gradient_checkpointing_disable()

    def compile_feed_forward(self) -> None:
        """Compiles the language model's feed-forward layers with torch, for any number of tokens.

        They are most of a layer's operations, and read no mask or position, so that a batch of another layout
        triggers no recompilation.
        """
        for layer in self.language_model.model.layers:
            layer.mlp.compile(dynamic=True)

    def prepare_forward(
        self, text: TextBatch, audio_features: dict[str, Tensor] | None, audio_lengths: dict[str, Tensor] | None
    ) -> ForwardInputs:
        """Prepares a forward pass over a batch.

        In this order: audio tokens (`audio_streams`), audio KV (`audio_kv`), layout (`layout`), embeddings, attention
        inputs (`attention_inputs`).
        """
        audio = self.audio_kv(audio_features, audio_lengths)
        return self.forward_inputs(self.layout(text, audio), audio)

    def audio_kv(self, audio_features: dict[str, Tensor] | None, audio_lengths: dict[str, Tensor] | None) -> AudioKV:
        """Runs every connector, on a dummy clip of silence if there is no clip; returns the audio KV of the clips."""
        like: Any = self.get_input_embeddings().weight
        return AudioKV(
            self.language_model,
            self.audio_streams,
            run_connectors(self.audio_streams, self.config.encoder_widths, audio_features, audio_lengths, like),
            norm_audio_tokens=self.config.norm_audio_tokens,
            audio_queries=self.config.audio_queries,
        )

    def layout(self, text: TextBatch, audio: AudioKV, *, clips: Tensor | None = None, pad_left: bool = False) -> Layout:
        """Lays out the batch, on the model's device; see `build_layout`.

        Args:
            clips: (num_placeholders,) clip of each placeholder, row by row; None means in order, each used once.
        """
        tokens = audio.audio
        none = [torch.empty(0, dtype=torch.long)] * len(self.specs)
        counts, frames = (none, none) if tokens.dummy_clip else (tokens.counts, tokens.frames)
        layout = build_layout(
            text.cpu(), BatchClips(counts, frames, clips), self.specs, self.config.audio_token_id, pad_left=pad_left
        )
        return layout.to(self.get_input_embeddings().weight.device)  # type: ignore[arg-type]

    def forward_inputs(self, layout: Layout, audio: AudioKV) -> ForwardInputs:
        """Returns the inputs of a pass over a whole layout."""
        attention_inputs = AttentionInputs(
            layout.metadata,
            layout.metadata,
            PositionedKV(audio, layout.audio_layouts),
            plain_causal=layout.plain_causal and not self.config.system_text_sees_audio,
            max_position=layout.max_position,
            system_text_sees_audio=self.config.system_text_sees_audio,
            attention_path=self.attention_path,
            packed_questions=layout.packed_questions,
        )
        position_ids = layout.metadata.position.clamp(min=0)
        return ForwardInputs(layout, self._embed(layout, audio.audio), position_ids, attention_inputs)

    def _embed(self, layout: Layout, audio: AudioTokens) -> Tensor:
        """Returns (B, T, D): text embeddings with the tokens of PLITS at their entries."""
        x_BTD = self.get_input_embeddings()(layout.token_ids)
        scale = audio_embedding_scale(self.language_model)
        for i, spec in enumerate(self.specs):
            if spec.integration != "plits":
                continue
            if audio.dummy_clip:
                x_BTD = x_BTD + audio.tokens[i].sum() * 0
                continue
            x_ND = audio.tokens[i]
            if layout.reuses_clips:
                x_ND = x_ND[layout.sequence_sources[i]]
            x_ND = x_ND if scale is None else x_ND / scale.to(x_ND.dtype)
            x_BTD = x_BTD.flatten(0, 1).index_copy(0, layout.sequence_entries[i], x_ND).view_as(x_BTD)
        return x_BTD
