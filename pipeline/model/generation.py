"""Decoding: audio is encoded once, its keys and values stay beside the text cache, transformers picks the tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.core.errors import UserError
from pipeline.core.streams import IntegrationKind
from pipeline.model.attention_inputs import AttentionInputs
from pipeline.model.audio_kv import AudioKV
from pipeline.model.positions import TokenMetadata
from pipeline.model.prefix_cache import PrefixCache, pieces


@dataclass
class Decoding:
    """What stays fixed while one batch of prompts is answered.

    Attributes:
        prompt: attention_inputs of the prompts, prefixes included, with the audio keys and values of all layers.
        next_position: (rows,) position of the first new token of each prompt.
        prefix, prefix_rows: what was read before, and (rows,) which row of it each prompt goes on from; or None.
    """

    prompt: AttentionInputs
    next_position: Tensor
    prefix: PrefixCache | None = None
    prefix_rows: Tensor | None = None

    def begin(self, cache: Cache, rows: int) -> None:
        """Gives the empty cache of `rows` rows (beams included) what was read before."""
        if self.prefix is not None and self.prefix_rows is not None:
            self.prefix.fill(cache, self.prefix_rows.repeat_interleave(rows // len(self.prefix_rows)))

    def attention_inputs(self, seen: int, new: int, rows: int) -> tuple[AttentionInputs, Tensor]:
        """Context and position ids (rows, new) of the next `new` entries after `seen` cached ones.

        Beams are rows that follow one another, and take each other's place within one prompt only: what belongs to a
        prompt never has to be reordered.
        """
        prompt, audio, next_position = self.prompt.key, self.prompt.audio, self.next_position
        times = rows // len(next_position)
        if times > 1:
            each = torch.arange(len(next_position), device=next_position.device).repeat_interleave(times)
            prompt, audio, next_position = prompt.pick(each), audio.pick(each), next_position[each]
        step = torch.arange(max(0, seen + new - prompt.position.shape[1]), device=next_position.device)
        position = next_position[:, None] + step
        valid = torch.ones_like(position, dtype=torch.bool)
        answer = TokenMetadata(position, torch.zeros_like(position), valid, torch.zeros_like(valid))
        key = TokenMetadata.concat([prompt, answer])
        query = key.map(lambda x: x[:, seen:])
        attention_inputs = AttentionInputs(
            query,
            key,
            audio,
            plain_causal=self.prompt.plain_causal and seen == 0,
            max_position=self.prompt.max_position + len(step),
            system_text_sees_audio=self.prompt.system_text_sees_audio,
            # The few tokens of a question behind its prefix: FlexAttention would compile for every new length.
            attention_path="auto" if seen == 0 else "sdpa",
        )
        return attention_inputs, query.position.clamp(min=0)


class PalGeneration:
    """The part of `PalForCausalLM` that writes answers."""

    @torch.no_grad()
    def encode_audio(self: Any, audio_features: dict[str, Tensor], audio_lengths: dict[str, Tensor]) -> AudioKV:
        """Everything that decoding needs of some clips, computed once for any number of prompts.

        Raises:
            UserError: features are unfit.
        """
        return self.audio_kv(self.audio_tokens(audio_features, audio_lengths)).remember()

    @torch.no_grad()
    def read_prefix(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        audio_features: dict[str, Tensor],
        audio_lengths: dict[str, Tensor],
        *,
        hidden: Collection[IntegrationKind] = (),
    ) -> PrefixCache:
        """Reads the beginnings of conversations, with all that depends on their clips, for any number of questions.

        Args:
            input_ids, attention_mask: (B, T) text before the audio and a placeholder for each clip.
            audio_features, audio_lengths: as in `forward`.
            hidden: integrations whose audio tokens nothing may see; positions stay as they are.

        Raises:
            UserError: placeholders and clips disagree, or features are unfit.
        """
        audio = self.audio_kv(self.audio_tokens(audio_features, audio_lengths))
        return self.prefix_of(input_ids, attention_mask, audio, hidden=hidden)

    @torch.no_grad()
    def prefix_of(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        audio: AudioKV,
        *,
        hidden: Collection[IntegrationKind] = (),
    ) -> PrefixCache:
        """`read_prefix` with clips whose audio tokens are there already; takes LAL's keys and values out of `audio`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        layout = self.layout(audio.audio, input_ids, mask, pad_left=True).hide(self.specs, hidden)
        attention_inputs = self.attention_inputs(layout, audio)
        attention_inputs.audio.remember()
        audio.release()
        cache = DynamicCache()
        x_BTD, position_ids = self.embed(layout, audio.audio), layout.places.position.clamp(min=0)
        for part, piece in pieces(attention_inputs, x_BTD):
            self.language_model.model(
                inputs_embeds=x_BTD[:, piece],
                position_ids=position_ids[:, piece],
                past_key_values=cache,
                use_cache=True,
                pal=part,
            )
        return PrefixCache(attention_inputs, layout.next_position, cache)

    @torch.no_grad()
    def generate(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_features: dict[str, Tensor] | None = None,
        audio_lengths: dict[str, Tensor] | None = None,
        *,
        audio: AudioKV | None = None,
        clips: Tensor | None = None,
        prefix: PrefixCache | None = None,
        prefix_rows: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Answers to a batch of prompts of unequal length.

        Args:
            input_ids, attention_mask: (B, T) prompts, padded on either side; one placeholder for each clip.
            audio_features, audio_lengths: as in `forward`.
            audio: clips encoded before by `encode_audio`, instead of features.
            clips: (num_placeholders,) which of these clips each placeholder is, row by row; None means in their order,
                or the one clip for every placeholder.
            prefix: the prompts' beginnings, read before by `read_prefix`; `input_ids` then hold what comes after them.
            prefix_rows: (B,) which of the beginnings each prompt goes on from.
            settings: of transformers' `generate` (max_new_tokens, do_sample, num_beams, eos_token_id, ...).

        Returns:
            (B * num_return_sequences, new_tokens): the answers alone, padded after their end.

        Raises:
            UserError: placeholders and clips disagree, or features are unfit.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if prefix is not None and prefix_rows is not None:
            inputs_embeds, decoding = self._after_prefix(input_ids, mask, prefix, prefix_rows.to(input_ids.device))
        else:
            if audio is None:
                audio = self.audio_kv(self.audio_tokens(audio_features, audio_lengths))
            elif clips is None and audio.audio.num_clips == 1:
                placeholders = int((mask.bool() & (input_ids == self.config.audio_token_id)).sum())
                clips = torch.zeros(placeholders, dtype=torch.long)
            layout = self.layout(audio.audio, input_ids, mask, clips=clips, pad_left=True)
            shared = replace(layout, beside={key: places.shared() for key, places in layout.beside.items()})
            attention_inputs = self.attention_inputs(shared, audio)
            attention_inputs.audio.remember()
            inputs_embeds, decoding = self.embed(layout, audio.audio), Decoding(attention_inputs, layout.next_position)
        # Both mixins come after this class in the model's bases; transformers' own loop runs here.
        return super().generate(  # type: ignore[misc]
            inputs_embeds=inputs_embeds,
            attention_mask=inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long),  # `Decoding` knows better
            past_key_values=DynamicCache(),  # no sliding layers: windows count positions, which the mask knows
            decoding=decoding,
            **settings,
        )

    def _after_prefix(
        self: Any, input_ids: Tensor, mask: Tensor, prefix: PrefixCache, rows: Tensor
    ) -> tuple[Tensor, Decoding]:
        """Embedded rests of prompts, padding moved to the left, and how they go on from their prefixes."""
        order = mask.argsort(dim=1, stable=True)
        ids, valid = input_ids.gather(1, order), mask.gather(1, order).bool()
        if bool((valid & (ids == self.config.audio_token_id)).any()):
            raise UserError("input_ids", "hold an audio placeholder behind a prefix", "put all audio into the prefix")
        start = prefix.next_position[rows]
        position = torch.where(valid, start[:, None] + valid.long().cumsum(1) - 1, -1)
        nothing = torch.zeros_like(valid)
        own = TokenMetadata(position, torch.zeros_like(position), valid, nothing)
        key = TokenMetadata.concat([prefix.attention_inputs.key.pick(rows), own])
        attention_inputs = AttentionInputs(
            key,
            key,
            prefix.attention_inputs.audio.pick(rows),
            plain_causal=False,
            max_position=prefix.attention_inputs.max_position + ids.shape[1],
            system_text_sees_audio=prefix.attention_inputs.system_text_sees_audio,
        )
        return self.get_input_embeddings()(ids), Decoding(attention_inputs, start + valid.sum(1), prefix, rows)

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
        if input_ids.shape[1] == 0:
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
        if past_key_values.get_seq_length() == 0:
            decoding.begin(past_key_values, rows)
        attention_inputs, position_ids = decoding.attention_inputs(past_key_values.get_seq_length(), new, rows)
        hidden_BTD = self.language_model.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            pal=attention_inputs,
        ).last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.vocabulary_logits(hidden_BTD[:, -1:]), past_key_values=past_key_values
        )
