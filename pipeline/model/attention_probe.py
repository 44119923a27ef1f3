"""The attention probe: how much the tokens that predict an answer attend to text, LAL's keys and PLITS's tokens, and to
which moment of the clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.model.layout import TextBatch
from pipeline.model.modeling import PalForCausalLM

PATHWAYS = ("text", "lal", "plits")


@dataclass(frozen=True)
class AttentionMass:
    """Mean attention of the tokens that predict one answer.

    Attributes:
        mass: (L, H, 3) float32; shares of PATHWAYS, which sum to 1.
        token_weights: for each stream (L, audio tokens) float32; weight of each audio token of the clip, mean over
            heads.
    """

    mass: Tensor
    token_weights: list[Tensor]


@torch.no_grad()
def probe_attention(
    model: PalForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    audio_features: dict[str, Tensor],
    audio_lengths: dict[str, Tensor],
) -> AttentionMass:
    """Runs one conversation about one clip and records every layer's attention (arXiv 2506.10423 v3, figure 5).

    Args:
        input_ids, labels: (1, T_in); -100 where no answer is predicted.

    Raises:
        UserError: the model has flamingo streams, whose cross-attention weighs audio apart from text, or features do
            not fit the streams.
    """
    if any(spec.integration == "flamingo" for spec in model.specs):
        raise UserError("model", "attends to audio apart from text (flamingo)", "probe a model of PLITS or LAL streams")
    inputs = model.prepare_forward(TextBatch(input_ids, labels=labels), audio_features, audio_lengths)
    layout, audio = inputs.layout, inputs.attention_inputs.audio.clips
    in_sequence = layout.metadata.audio[0]
    counts = [int(n.sum()) for n in audio.audio.counts]
    mass: list[Tensor] = []
    token_weights = [torch.zeros(len(audio.lal), count) for count in counts]

    def hook(layer: int, weights_BHQK: Tensor) -> None:
        weights_HK = weights_BHQK[0, :, layout.predictors].mean(1).float()
        lal_HS, sequence_HT = weights_HK.tensor_split([weights_HK.shape[1] - len(in_sequence)], dim=1)
        shares = [sequence_HT[:, ~in_sequence].sum(1), lal_HS.sum(1), sequence_HT[:, in_sequence].sum(1)]
        mass.append(torch.stack(shares, dim=1).cpu())
        streams = audio.lal[layer]
        for stream, part in zip(streams, lal_HS.mean(0).split([counts[i] for i in streams]), strict=True):
            token_weights[stream][layer] = part
        for stream, entries in enumerate(layout.sequence_entries):
            if len(entries):
                token_weights[stream][layer] = sequence_HT.mean(0)[entries]

    model.language_model.model(
        inputs_embeds=inputs.embeddings,
        position_ids=inputs.position_ids,
        use_cache=False,
        pal=replace(inputs.attention_inputs, hook=hook),
    )
    return AttentionMass(torch.stack(mass), token_weights)
