"""Decoding: audio is encoded once, its keys and values stay beside the text cache, transformers picks the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.model.context import AttentionContext
from pipeline.model.layout import Places, build_layout

if TYPE_CHECKING:
    from pipeline.model.modeling import PalForCausalLM


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
        query = Places(*(x[:, seen:] for x in (key.position, key.segment, key.valid, key.audio)))
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
    def generate(
        self: PalForCausalLM,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_features: dict[str, Tensor] | None = None,
        audio_lengths: dict[str, Tensor] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Answers to a batch of prompts of unequal length.

        Args:
            input_ids, attention_mask: (B, T) prompts, padded on either side; one placeholder for each clip.
            audio_features, audio_lengths: as in `forward`.
            settings: of transformers' `generate` (max_new_tokens, do_sample, num_beams, eos_token_id, ...).

        Returns:
            (B * num_return_sequences, new_tokens): the answers alone, padded after their end.

        Raises:
            UserError: placeholders and clips disagree, or features are unfit.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens, counts, frames, dummy = self.audio_tokens(audio_features or {}, audio_lengths or {})
        layout = build_layout(
            input_ids.cpu(),
            attention_mask.cpu(),
            None,
            None,
            audio_token_id=self.config.audio_token_id,
            streams=self.specs,
            token_counts=counts,
            frame_counts=frames,
            pad_left=True,
        ).to(input_ids.device)
        context = self.attention_context(layout, tokens, dummy)
        context.audio.materialise()
        return super().generate(
            inputs_embeds=self.embed(layout, tokens, dummy),
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
        inputs = {"past_key_values": past_key_values, "decoding": decoding, "use_cache": True}
        if past_key_values.get_seq_length() == 0:
            return {"inputs_embeds": inputs_embeds, **inputs}
        return {"input_ids": input_ids[:, -1:], **inputs}

    def _decoding_step(
        self: PalForCausalLM,
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
