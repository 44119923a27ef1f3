"""`PalForCausalLM`: a language model of transformers plus audio streams; no forward of it is patched.

`base` prepares the forward pass, `generation` drives the decoding; `pipeline.model` names the files to read next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.model.attention import ATTENTION_NAME
from pipeline.model.configuration import PalConfig
from pipeline.model.families import family_of, logit_softcap
from pipeline.model.generation import Decoding, PalGeneration
from pipeline.model.layout import TextBatch


@dataclass
class PalOutput(CausalLMOutputWithPast):
    """What `PalForCausalLM` returns.

    Attributes:
        token_losses: (M,) cross-entropy of each token that carries loss, without gradient.
        target_tokens: (M,) flat index b * T + t of those tokens in `input_ids`.
    """

    token_losses: Tensor | None = None
    target_tokens: Tensor | None = None


class PalForCausalLM(PalGeneration):
    """A language model that reads audio through streams (arXiv 2506.10423); see `PalModel` for its arguments."""

    @classmethod
    def from_language_model(
        cls, config: PalConfig, dtype: torch.dtype | Literal["auto"] = torch.float32
    ) -> PalForCausalLM:
        """Loads a pretrained language model and gives it fresh streams.

        Under ZeRO-3 (an `HfDeepSpeedConfig` is alive) transformers loads the weights partition by partition.

        Args:
            config: what to build; `base_language_model` is the folder or Hub name to load, `language_model_config` its
                config.
            dtype: dtype of the weights; `auto` keeps that of the files.

        Raises:
            UserError: see `PalModel`.
        """
        family_of(config.language_model_config)
        language_model = AutoModelForCausalLM.from_pretrained(
            config.base_language_model,
            config=config.language_model_config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
        )
        config.language_model_config = language_model.config
        model = cls(config, language_model)
        model.streams.to(language_model.dtype)
        # Published settings of decoding (penalties, sampling) are no part of what is trained, and transformers refuses
        # to save some of them.
        published = language_model.generation_config
        model.generation_config = GenerationConfig(
            **{name: getattr(published, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        return model

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
        """Computes the loss, or the logits, of a batch.

        Everything but the features is read on the host: a batch in host memory causes no wait for the device.

        Args:
            input_ids: (B, T_in); each clip is one placeholder token `audio_token_id`.
            attention_mask: (B, T_in), 1 = real token; None means all are.
            labels: (B, T_in), -100 where no loss; shifted by one in here. With labels no logits are returned: the
                vocabulary is computed for tokens that carry loss alone.
            segment_ids: (B, T_in); 0 = shared prefix, 1, 2, ... = conversations packed behind it.
            audio_features: encoder -> (total_frames, W), all clips one after the other.
            audio_lengths: encoder -> (C,) frames; clips in the order of the placeholders, row by row.
            num_items_in_batch: divisor of the summed loss; None means the number of tokens that carry loss here.
            inputs_embeds, past_key_values, decoding, use_cache, return_dict: set by `generate`, for its steps.

        Returns:
            `PalOutput` with `loss`, or `logits` (B, T_in, vocabulary): for each token the prediction of the next (a
            placeholder predicts what follows the clip; at padding they are meaningless).

        Raises:
            UserError: placeholders and clips disagree, or features do not fit the streams.
        """
        if decoding is not None:
            return self._decoding_step(input_ids, inputs_embeds, past_key_values, decoding)
        assert input_ids is not None
        text = TextBatch(input_ids, attention_mask, segment_ids, labels)
        inputs = self.prepare_forward(text, audio_features, audio_lengths)
        hidden_BTD = self.language_model.model(
            inputs_embeds=inputs.embeddings,
            position_ids=inputs.position_ids,
            use_cache=False,
            pal=inputs.attention_inputs,
        ).last_hidden_state
        layout = inputs.layout
        hidden_ND = hidden_BTD.flatten(0, 1)
        if labels is None:
            return PalOutput(logits=self._vocabulary_logits(hidden_ND[layout.input_entries]))
        logits = self._vocabulary_logits(hidden_ND[layout.predictors])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, layout.targets, reduction="none")
        count = max(len(layout.targets), 1) if num_items_in_batch is None else num_items_in_batch
        return PalOutput(loss=losses.sum() / count, token_losses=losses.detach(), target_tokens=layout.target_tokens)

    def _decoding_step(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Cache,
        decoding: Decoding,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the next token: one step of `generate`, whose first step reads the prompts."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        rows, new, _ = inputs_embeds.shape
        if past_key_values.get_seq_length() == 0:
            decoding.fill_cache(past_key_values, rows)
        attention_inputs, position_ids = decoding.attention_inputs(past_key_values.get_seq_length(), new, rows)
        hidden_BTD = self.language_model.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            pal=attention_inputs,
        ).last_hidden_state
        return CausalLMOutputWithPast(
            logits=self._vocabulary_logits(hidden_BTD[:, -1:]), past_key_values=past_key_values
        )

    def _vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Returns the vocabulary logits of (..., D) hidden states, bounded in families that do so (Gemma 2)."""
        logits = self.get_output_embeddings()(hidden)
        softcap = logit_softcap(self.language_model.config)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap
