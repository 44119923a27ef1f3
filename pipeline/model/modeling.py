"""`PalForCausalLM`: a language model of transformers plus streams of audio, no forward of it patched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.core.streams import Stream, check_streams
from pipeline.model.attention import ATTENTION_NAME, flamingo_hook
from pipeline.model.attention_inputs import AttentionInputs, AttentionPath
from pipeline.model.audio_kv import AudioKV, PositionedKV
from pipeline.model.audio_streams import AudioStream, AudioTokens, audio_tokens, initialise
from pipeline.model.configuration import PalConfig
from pipeline.model.families import audio_embedding_scale, family_of, logit_softcap
from pipeline.model.generation import Decoding, PalGeneration
from pipeline.model.layout import Layout, build_layout
from pipeline.model.lora import adapt


@dataclass
class PalOutput(CausalLMOutputWithPast):
    """What `PalForCausalLM` returns.

    Attributes:
        token_losses: (M,) cross-entropy of each token that carries loss, without gradient.
        target_tokens: (M,) flat index b * T + t of those tokens in `input_ids`.
    """

    token_losses: Tensor | None = None
    target_tokens: Tensor | None = None


class PalForCausalLM(PalGeneration, PreTrainedModel, GenerationMixin):
    """A language model that hears through streams (arXiv 2506.10423).

    Args:
        config: what to build.
        language_model: a loaded model to take; None builds one with random weights.

    Raises:
        UserError: an unsupported family, layers beyond the model, or streams that cannot be built.
    """

    config_class = PalConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True

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
        # transformers 4 clears it on the config of a part when the config of the whole is built
        language_model.set_attn_implementation(ATTENTION_NAME)
        self.audio_streams = [AudioStream(spec, config) for spec in self.specs]
        self.streams = nn.ModuleList(self.audio_streams)
        for layer in sorted({n for s in self.specs if s.integration == "flamingo" for n in s.audio_layers}):
            language_model.model.layers[layer].register_forward_pre_hook(flamingo_hook, with_kwargs=True)
        self._stream_names = {module: name for name, module in self.streams.named_modules(prefix="streams")}
        self.post_init()

    @classmethod
    def from_language_model(
        cls,
        name: str,
        *,
        streams: Sequence[Stream],
        encoder_widths: dict[str, int],
        audio_token_id: int,
        encoder_grids: dict[str, Sequence[int]] | None = None,
        norm_audio_tokens: bool = True,
        system_text_sees_audio: bool = False,
        audio_queries: bool = False,
        feature_fingerprints: dict[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PalForCausalLM:
        """A pretrained language model with fresh streams.

        Under ZeRO-3 (an `HfDeepSpeedConfig` is alive) transformers loads the weights partition by partition.

        Args:
            name: a Hugging Face folder or Hub name.

        Raises:
            UserError: see `PalForCausalLM`.
        """
        config = AutoConfig.from_pretrained(name)
        family_of(config)
        language_model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
        pal_config = PalConfig(
            language_model.config,
            streams,
            encoder_widths,
            audio_token_id,
            encoder_grids,
            norm_audio_tokens,
            system_text_sees_audio,
            audio_queries,
            feature_fingerprints,
            base_language_model=str(name),
        )
        model = cls(pal_config, language_model)
        model.streams.to(dtype)
        model.generation_config = language_model.generation_config
        return model

    def _init_weights(self, module: nn.Module) -> None:
        # transformers asks this for modules without saved weights; the language model answers for itself.
        if module in self._stream_names:
            initialise(module, self._stream_names[module])

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes each layer in the backward pass, the projections of its audio included.

        Always without reentrance: the reentrant form drops gradients of tensors that travel by keyword.
        """
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_feed_forward(self) -> None:
        """Lets torch compile the language model's feed-forward layers, for any number of tokens.

        They are most of a layer's operations, and no mask or position enters them, so that a batch of another layout
        compiles nothing again.
        """
        for layer in self.language_model.model.layers:
            layer.mlp.compile(dynamic=True)

    def gradient_checkpointing_disable(self) -> None:
        self.language_model.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        audio_features: dict[str, Tensor] | None = None,
        audio_lengths: dict[str, Tensor] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        decoding: Decoding | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Loss, or logits, of a batch.

        All but the features is read on the host: a batch that lies there need not be waited for.

        Args:
            input_ids: (B, T); each clip is one placeholder token `audio_token_id`.
            attention_mask: (B, T), 1 = real token; None means all are.
            labels: (B, T), -100 where no loss; shifted by one in here. Given, no logits are returned: the vocabulary
                is computed for tokens that carry loss alone.
            segment_ids: (B, T); 0 = shared prefix, 1, 2, ... = conversations packed behind it.
            audio_features: encoder -> (total_frames, width), all clips one after the other.
            audio_lengths: encoder -> (num_clips,) frames; clips in the order of the placeholders, row by row.
            num_items_in_batch: what the summed loss is divided by; None means the tokens that carry loss here.
            inputs_embeds, past_key_values, decoding, use_cache, return_dict: of `generate`, for its steps.

        Returns:
            `PalOutput` with `loss`, or `logits` (B, T, vocabulary): of each token the prediction of the next (a
            placeholder predicts what follows the clip; at padding they mean nothing).

        Raises:
            UserError: placeholders and clips disagree, or features are unfit.
        """
        if decoding is not None:
            return self._decoding_step(input_ids, inputs_embeds, past_key_values, decoding)
        assert input_ids is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        audio = self.audio_kv(self.audio_tokens(audio_features, audio_lengths))
        layout = self.layout(audio.audio, input_ids, mask, segment_ids, labels)
        hidden_BTD = self.language_model.model(
            inputs_embeds=self.embed(layout, audio.audio),
            position_ids=layout.places.position.clamp(min=0),
            use_cache=False,
            pal=self.attention_inputs(layout, audio),
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)
        if labels is None:
            return PalOutput(logits=self.vocabulary_logits(hidden_ND[layout.input_entries]))
        logits = self.vocabulary_logits(hidden_ND[layout.predictors])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, layout.targets, reduction="none")
        count = max(len(layout.targets), 1) if num_items_in_batch is None else num_items_in_batch
        return PalOutput(loss=losses.sum() / count, token_losses=losses.detach(), target_tokens=layout.target_tokens)

    def audio_tokens(
        self, audio_features: dict[str, Tensor] | None, audio_lengths: dict[str, Tensor] | None
    ) -> AudioTokens:
        """Runs every connector; on one stand-in clip of silence if the batch holds none."""
        like: Any = self.get_input_embeddings().weight
        return audio_tokens(self.audio_streams, self.config.encoder_widths, audio_features, audio_lengths, like)

    def audio_kv(self, audio: AudioTokens) -> AudioKV:
        """What these clips give to the layers."""
        return AudioKV(
            self.language_model,
            self.audio_streams,
            audio,
            norm_audio_tokens=self.config.norm_audio_tokens,
            audio_queries=self.config.audio_queries,
        )

    def layout(
        self,
        audio: AudioTokens,
        input_ids: Tensor,
        attention_mask: Tensor,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        clips: Tensor | None = None,
        pad_left: bool = False,
    ) -> Layout:
        """The batch as the language model sees it, on the model's device; see `build_layout`."""
        none = torch.empty(0, dtype=torch.long)
        layout = build_layout(
            input_ids.cpu(),
            attention_mask.cpu(),
            None if segment_ids is None else segment_ids.cpu(),
            None if labels is None else labels.cpu(),
            audio_token_id=self.config.audio_token_id,
            streams=self.specs,
            token_counts=[none] * len(self.specs) if audio.dummy_clip else audio.counts,
            frame_counts=[none] * len(self.specs) if audio.dummy_clip else audio.frames,
            clips=clips,
            pad_left=pad_left,
        )
        return layout.to(self.get_input_embeddings().weight.device)  # type: ignore[arg-type]

    def embed(self, layout: Layout, audio: AudioTokens) -> Tensor:
        """(B, T, d): text embeddings with the tokens of PLITS at their entries."""
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
            x_ND = x_ND if scale is None else x_ND / scale.to(x_ND)
            x_BTD = x_BTD.flatten(0, 1).index_copy(0, layout.sequence_entries[i], x_ND).view_as(x_BTD)
        return x_BTD

    def attention_inputs(
        self, layout: Layout, audio: AudioKV, hook: Callable[[int, Tensor], None] | None = None
    ) -> AttentionInputs:
        """The context of a pass over all entries of a layout; `hook` is given every layer's attention weights."""
        return AttentionInputs(
            layout.places,
            layout.places,
            PositionedKV(audio, layout.beside),
            plain_causal=layout.plain_causal and not self.config.system_text_sees_audio,
            max_position=layout.max_position,
            system_text_sees_audio=self.config.system_text_sees_audio,
            attention_path=self.attention_path,
            packed_questions=layout.packed_questions,
            hook=hook,
        )

    def vocabulary_logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits over the vocabulary, bounded where the family bounds them (Gemma 2)."""
        logits = self.get_output_embeddings()(hidden_ND)
        softcap = logit_softcap(self.language_model.config)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap
