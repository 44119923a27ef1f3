"""Decoding: audio is encoded once, its KV is kept beside the text cache, transformers' `generate` picks the tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache

from pipeline.core.errors import UserError
from pipeline.core.streams import IntegrationKind
from pipeline.model.attention_inputs import AttentionInputs
from pipeline.model.audio_kv import AudioKV
from pipeline.model.base import PalModel
from pipeline.model.layout import TextBatch
from pipeline.model.positions import TokenMetadata
from pipeline.model.prefix_cache import PrefixCache, prefill_chunks


@dataclass
class Decoding:
    """What stays fixed while the answers to one batch of prompts are generated.

    Attributes:
        prompt: attention inputs of the prompts, prefixes included, with the audio KV of all layers.
        next_position: (B,) position of the first new token of each prompt.
        prefix: the prefilled prefixes that the prompts continue; None if there are none.
        prefix_rows: (B,) row of `prefix` that each prompt continues.
    """

    prompt: AttentionInputs
    next_position: Tensor
    prefix: PrefixCache | None = None
    prefix_rows: Tensor | None = None

    def fill_cache(self, cache: Cache, rows: int) -> None:
        """Copies the prefixes into the empty cache of `rows` rows (beams included)."""
        if self.prefix is not None and self.prefix_rows is not None:
            self.prefix.fill(cache, self.prefix_rows.repeat_interleave(rows // len(self.prefix_rows)))

    def attention_inputs(self, cached: int, new: int, rows: int) -> tuple[AttentionInputs, Tensor]:
        """Returns attention inputs and position ids (rows, new) of the `new` entries that follow `cached` cached ones.

        Beams of a prompt are consecutive rows, and are swapped within that prompt only: what belongs to a prompt never
        has to be reordered.
        """
        prompt, audio, next_position = self.prompt.key, self.prompt.audio, self.next_position
        beams = rows // len(next_position)
        if beams > 1:
            prompt_of_row = torch.arange(len(next_position), device=next_position.device).repeat_interleave(beams)
            prompt, audio = prompt.select_rows(prompt_of_row), audio.select_rows(prompt_of_row)
            next_position = next_position[prompt_of_row]
        step = torch.arange(max(0, cached + new - prompt.position.shape[1]), device=next_position.device)
        position = next_position[:, None] + step
        valid = torch.ones_like(position, dtype=torch.bool)
        answer = TokenMetadata(position, torch.zeros_like(position), valid, torch.zeros_like(valid))
        key = TokenMetadata.concat([prompt, answer])
        query = key.map(lambda x: x[:, cached:])
        attention_inputs = AttentionInputs(
            query,
            key,
            audio,
            plain_causal=self.prompt.plain_causal and cached == 0,
            max_position=self.prompt.max_position + len(step),
            system_text_sees_audio=self.prompt.system_text_sees_audio,
            # The few tokens of a question behind its prefix: FlexAttention would compile for every new length.
            attention_path="auto" if cached == 0 else "sdpa",
        )
        return attention_inputs, query.position.clamp(min=0)


class PalGeneration(PalModel, GenerationMixin):
    """The part of `PalForCausalLM` that encodes audio, prefills prefixes and generates answers."""

    @torch.no_grad()
    def encode_audio(self, audio_features: dict[str, Tensor], audio_lengths: dict[str, Tensor]) -> AudioKV:
        """Computes the audio KV of some clips at all layers, for any number of prompts.

        Raises:
            UserError: features do not fit the streams.
        """
        return self.audio_kv(audio_features, audio_lengths).precompute()

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        audio_features: dict[str, Tensor],
        audio_lengths: dict[str, Tensor],
        *,
        clips: Tensor | None = None,
        hidden: Collection[IntegrationKind] = (),
    ) -> PrefixCache:
        """Prefills the beginnings of conversations, up to the end of their clips, for any number of questions.

        Args:
            input_ids, attention_mask: (B, T_in) text before the audio and a placeholder for each clip.
            audio_features, audio_lengths: as in `forward`.
            clips: (num_placeholders,) which of these clips each placeholder stands for, row by row; None means in
                their order, each once.
            hidden: integrations whose audio tokens are masked from every query; positions stay as they are.

        Raises:
            UserError: placeholders and clips disagree, or features do not fit the streams.
        """
        audio = self.audio_kv(audio_features, audio_lengths)
        return self.prefill_audio_kv(input_ids, attention_mask, audio, clips=clips, hidden=hidden)

    @torch.no_grad()
    def prefill_audio_kv(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        audio: AudioKV,
        *,
        clips: Tensor | None = None,
        hidden: Collection[IntegrationKind] = (),
    ) -> PrefixCache:
        """Does the same as `prefill` with clips that are encoded already; releases LAL's keys and values in `audio`."""
        layout = self.layout(TextBatch(input_ids, attention_mask), audio, clips=clips, pad_left=True)
        inputs = self.forward_inputs(layout.hide(self.specs, hidden), audio)
        inputs.attention_inputs.audio.precompute()
        audio.release()
        cache = DynamicCache()
        for chunk_inputs, chunk in prefill_chunks(inputs.attention_inputs, inputs.embeddings):
            self.language_model.model(
                inputs_embeds=inputs.embeddings[:, chunk],
                position_ids=inputs.position_ids[:, chunk],
                past_key_values=cache,
                use_cache=True,
                pal=chunk_inputs,
            )
        return PrefixCache(inputs.attention_inputs, layout.next_position, cache)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_features: dict[str, Tensor] | None = None,
        audio_lengths: dict[str, Tensor] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Generates answers to a batch of prompts of unequal length.

        Args:
            input_ids, attention_mask: (B, T_in) prompts, padded on either side; one placeholder for each clip.
            audio_features, audio_lengths: as in `forward`.
            settings: settings of transformers' `generate` (max_new_tokens, do_sample, num_beams, eos_token_id, ...).

        Returns:
            (B * num_return_sequences, new tokens): the answers alone, padded after their end.

        Raises:
            UserError: placeholders and clips disagree, or features do not fit the streams.
        """
        audio = self.audio_kv(audio_features, audio_lengths)
        return self._generate_with_audio(TextBatch(input_ids, attention_mask), audio, None, settings)

    @torch.no_grad()
    def generate_from_audio_kv(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        audio: AudioKV,
        clips: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Does the same as `generate` with clips that `encode_audio` encoded.

        Args:
            clips: (num_placeholders,) which of these clips each placeholder stands for, row by row; None means in
                their order, or the one clip for every placeholder.
        """
        if clips is None and audio.audio.num_clips == 1:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            placeholders = int((mask.bool() & (input_ids == self.config.audio_token_id)).sum())
            clips = torch.zeros(placeholders, dtype=torch.long)
        return self._generate_with_audio(TextBatch(input_ids, attention_mask), audio, clips, settings)

    @torch.no_grad()
    def generate_from_prefix(
        self,
        prefix: PrefixCache,
        prefix_rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Does the same as `generate` for prompts whose beginnings `prefill` has read.

        Args:
            prefix_rows: (B,) row of `prefix` that each prompt continues.
            input_ids, attention_mask: (B, T_in) what follows the prefix, without placeholders.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = prefix_rows.to(input_ids.device)
        order = mask.argsort(dim=1, stable=True)  # padding moves to the left
        ids, valid = input_ids.gather(1, order), mask.gather(1, order).bool()
        if bool((valid & (ids == self.config.audio_token_id)).any()):
            raise UserError("input_ids", "hold an audio placeholder behind a prefix", "put all audio into the prefix")
        start = prefix.next_position[rows]
        position = torch.where(valid, start[:, None] + valid.long().cumsum(1) - 1, -1)
        question = TokenMetadata(position, torch.zeros_like(position), valid, torch.zeros_like(valid))
        key = TokenMetadata.concat([prefix.attention_inputs.key.select_rows(rows), question])
        attention_inputs = AttentionInputs(
            key,
            key,
            prefix.attention_inputs.audio.select_rows(rows),
            plain_causal=False,
            max_position=prefix.attention_inputs.max_position + ids.shape[1],
            system_text_sees_audio=prefix.attention_inputs.system_text_sees_audio,
        )
        decoding = Decoding(attention_inputs, start + valid.sum(1), prefix, rows)
        return self._generate(self.get_input_embeddings()(ids), decoding, settings)

    def _generate_with_audio(
        self, text: TextBatch, audio: AudioKV, clips: Tensor | None, settings: dict[str, Any]
    ) -> Tensor:
        layout = self.layout(text, audio, clips=clips, pad_left=True)
        audio_layouts = {streams: rows.merge_equal_rows() for streams, rows in layout.audio_layouts.items()}
        inputs = self.forward_inputs(replace(layout, audio_layouts=audio_layouts), audio)
        inputs.attention_inputs.audio.precompute()
        return self._generate(inputs.embeddings, Decoding(inputs.attention_inputs, layout.next_position), settings)

    def _generate(self, x_BTD: Tensor, decoding: Decoding, settings: dict[str, Any]) -> Tensor:
        return super().generate(
            inputs_embeds=x_BTD,
            # All ones, for transformers' bookkeeping: `decoding` holds what is padding.
            attention_mask=x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.long),
            past_key_values=DynamicCache(),  # no sliding layers: windows count positions, which the mask rule knows
            decoding=decoding,
            **settings,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoding: Decoding | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,  # masks and positions that transformers would build: `Decoding` builds ours
    ) -> dict[str, Any]:
        """Returns the inputs of the next step: the embedded prompts first, the newest token after that."""
        inputs = {"past_key_values": past_key_values, "decoding": decoding, "use_cache": True}
        if input_ids.shape[1] == 0:
            return {"inputs_embeds": inputs_embeds, **inputs}
        return {"input_ids": input_ids[:, -1:], **inputs}
