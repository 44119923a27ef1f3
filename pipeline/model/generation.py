"""Decoding: audio is encoded once, its keys and values stay beside the text cache, transformers picks the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.model.audio_keys import AudioKeys
from pipeline.model.context import AttentionContext
from pipeline.model.places import Places


@dataclass
class Decoding:
    """What stays fixed while one batch of prompts is answered.

    Attributes:
        prompt: context of the prompts' own pass, with the audio keys and values of all layers.
        next_position: (rows,) position of the first new token of each prompt.
    """

    prompt: AttentionContext
    next_position: Tensor

    def context(self, seen: int, new: int, rows: int) -> tuple[AttentionContext, Tensor]:
        """Context and position ids (rows, new) of the next `new` entries after `seen` cached ones.

        Beams are rows that follow one another, and take each other's place within one prompt only: what belongs to a
        prompt never has to be reordered.
        """
        times = rows // len(self.next_position)
        prompt = self.prompt.key.repeat(times) if times > 1 else self.prompt.key
        length = prompt.position.shape[1]
        if seen == 0:
            context = AttentionContext(
                prompt,
                prompt,
                self.prompt.audio.repeat(times),
                plain_causal=self.prompt.plain_causal,
                max_position=self.prompt.max_position,
                system_text_sees_audio=self.prompt.system_text_sees_audio,
            )
            return context, prompt.position.clamp(min=0)
        step = torch.arange(seen + new - length, device=prompt.position.device)
        position = self.next_position.repeat_interleave(times)[:, None] + step
        segment = prompt.segment.amax(1, keepdim=True).expand_as(position)
        valid = torch.ones_like(position, dtype=torch.bool)
        answer = Places(position, segment, valid, torch.zeros_like(valid))
        key = Places.concat([prompt, answer])
        query = key.map(lambda x: x[:, seen:])
        context = AttentionContext(
            query,
            key,
            self.prompt.audio.repeat(times),
            plain_causal=False,
            max_position=self.prompt.max_position + len(step),
            system_text_sees_audio=self.prompt.system_text_sees_audio,
        )
        return context, query.position


class PalGeneration:
    """The part of `PalForCausalLM` that writes answers."""

    @torch.no_grad()
    def encode_audio(self: Any, audio_features: dict[str, Tensor], audio_lengths: dict[str, Tensor]) -> AudioKeys:
        """Everything that decoding needs of some clips, computed once for any number of prompts.

        Raises:
            UserError: features are unfit.
        """
        return self.audio_keys(self.audio_tokens(audio_features, audio_lengths)).remember()

    @torch.no_grad()
    def generate(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_features: dict[str, Tensor] | None = None,
        audio_lengths: dict[str, Tensor] | None = None,
        *,
        audio: AudioKeys | None = None,
        clips: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Answers to a batch of prompts of unequal length.

        Args:
            input_ids, attention_mask: (B, T) prompts, padded on either side; one placeholder for each clip.
            audio_features, audio_lengths: as in `forward`.
            audio: clips encoded before by `encode_audio`, instead of features.
            clips: (num_placeholders,) which of these clips each placeholder is, row by row; None means in their order,
                or the one clip for every placeholder.
            settings: of transformers' `generate` (max_new_tokens, do_sample, num_beams, eos_token_id, ...).

        Returns:
            (B * num_return_sequences, new_tokens): the answers alone, padded after their end.

        Raises:
            UserError: placeholders and clips disagree, or features are unfit.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if audio is None:
            audio = self.audio_keys(self.audio_tokens(audio_features, audio_lengths))
        elif clips is None and audio.audio.num_clips == 1:
            clips = torch.zeros(int((mask.bool() & (input_ids == self.config.audio_token_id)).sum()), dtype=torch.long)
        layout = self.layout(audio.audio, input_ids, mask, clips=clips, pad_left=True)
        shared = replace(layout, beside={key: places.shared() for key, places in layout.beside.items()})
        context = self.attention_context(shared, audio)
        context.audio.remember()
        # Both mixins come after this class in the model's bases; transformers' own loop runs here.
        return super().generate(  # type: ignore[misc]
            inputs_embeds=self.embed(layout, audio.audio),
            attention_mask=layout.places.valid.long(),
            past_key_values=DynamicCache(),  # no sliding layers: windows count positions, which the mask knows
            decoding=Decoding(context, layout.next_position),
            **settings,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoding: Decoding | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,  # masks and positions that transformers would make: `Decoding` makes ours
    ) -> dict[str, Any]:
        """Inputs of the next step: the embedded prompts first, the newest token after that."""
        cache: Any = past_key_values
        inputs = {"past_key_values": past_key_values, "decoding": decoding, "use_cache": True}
        if cache.get_seq_length() == 0:
            return {"inputs_embeds": inputs_embeds, **inputs}
        return {"input_ids": input_ids[:, -1:], **inputs}

    def _decoding_step(
        self: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Cache,
        decoding: Decoding,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        rows, new, _ = inputs_embeds.shape
        context, position_ids = decoding.context(past_key_values.get_seq_length(), new, rows)
        hidden_BTD = self.language_model.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            pal=context,
        ).last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.vocabulary_logits(hidden_BTD[:, -1:]), past_key_values=past_key_values
        )
