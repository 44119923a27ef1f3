"""What the tokens that predict an answer attend to: text, LAL's keys, PLITS's tokens; and which moment of the clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.model.modeling import PalForCausalLM

KINDS = ("text", "lal", "plits")


@dataclass(frozen=True)
class AttentionMass:
    """Mean attention of the tokens that predict one answer.

    Attributes:
        mass: (layers, heads, 3) float32; shares of KINDS, which sum to 1.
        tokens: for each stream (layers, tokens) float32; weight of each audio token of the clip, mean over heads.
    """

    mass: Tensor
    tokens: list[Tensor]


@torch.no_grad()
def probe_attention(
    model: PalForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    audio_features: dict[str, Tensor],
    audio_lengths: dict[str, Tensor],
) -> AttentionMass:
    """Runs one conversation about one clip and watches every layer (arXiv 2506.10423 v3, figure 5).

    Args:
        input_ids, labels: (1, T); -100 where no answer is predicted.

    Raises:
        UserError: a model with flamingo streams, whose cross-attention weighs audio apart from text; unfit features.
    """
    if any(spec.integration == "flamingo" for spec in model.specs):
        raise UserError("model", "attends to audio apart from text (flamingo)", "probe a model of PLITS or LAL streams")
    audio = model.audio_kv(model.audio_tokens(audio_features, audio_lengths))
    layout = model.layout(audio.audio, input_ids, torch.ones_like(input_ids), None, labels)
    in_sequence = layout.places.audio[0]
    counts = [int(n.sum()) for n in audio.audio.counts]
    mass: list[Tensor] = []
    tokens = [torch.zeros(len(audio.lal), count) for count in counts]

    def hook(layer: int, weights_BHQK: Tensor) -> None:
        weights_HK = weights_BHQK[0, :, layout.predictors].mean(1).float()
        beside = weights_HK.shape[1] - len(in_sequence)
        own = weights_HK[:, beside:]
        shares = [own[:, ~in_sequence].sum(1), weights_HK[:, :beside].sum(1), own[:, in_sequence].sum(1)]
        mass.append(torch.stack(shares, dim=1).cpu())
        lal = audio.lal[layer]
        for stream, part in zip(lal, weights_HK[:, :beside].mean(0).split([counts[i] for i in lal]), strict=True):
            tokens[stream][layer] = part
        for stream, entries in enumerate(layout.sequence_entries):
            if len(entries):
                tokens[stream][layer] = own.mean(0)[entries]

    model.language_model.model(
        inputs_embeds=model.embed(layout, audio.audio),
        position_ids=layout.places.position.clamp(min=0),
        use_cache=False,
        pal=model.attention_inputs(layout, audio, hook),
    )
    return AttentionMass(torch.stack(mass), tokens)
