"""The trainable audio side of a model: each stream's connector and what it adds at its layers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model.configuration import PalConfig
from pipeline.model.connectors import Mlp, build_connector
from pipeline.streams import Stream


class AudioStream(nn.Module):
    """One stream: `connector`, and for LAL `layer_projections` (P_l, one for each audio layer)."""

    def __init__(self, spec: Stream, config: PalConfig) -> None:
        super().__init__()
        self.spec = spec
        hidden = config.language_model_config.hidden_size
        widths = [config.encoder_widths[name] for name in spec.encoders]
        width = spec.connector.width or (hidden if spec.integration == "plits" else widths[0])
        if spec.integration == "plits" and width != hidden:
            raise UserError(
                "model.connector.width",
                f"{width} is not the language model's width {hidden}, which tokens in the sequence need",
                "leave it out for plits",
            )
        self.connector = build_connector(spec.connector, widths, width)
        layers = spec.audio_layers if spec.integration == "lal" else ()
        self.layer_projections = nn.ModuleDict({str(layer): Mlp(width, hidden) for layer in layers})

    def initialise(self, name: str) -> None:
        """Draws every parameter from a generator of its own, seeded by torch's seed and the parameter's module name.

        Two models made under one seed therefore share the values of same-named parameters of equal shape, whatever
        else they hold: their comparison starts from the same point.
        """
        for path, module in self.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed((torch.initial_seed() + zlib.crc32(f"{name}.{path}".encode())) % 2**63)
                    reset()


def check_features(
    streams: Sequence[Stream],
    encoder_widths: dict[str, int],
    audio_features: dict[str, Tensor],
    audio_lengths: dict[str, Tensor],
) -> int:
    """Checks a batch's audio.

    Returns:
        the number of clips.

    Raises:
        UserError: an encoder is absent, a width is wrong, frames and lengths disagree, a clip is empty, encoders
            hold different numbers of clips, or features are not finite.
    """
    clips = set()
    for name in dict.fromkeys(name for s in streams for name in s.encoders):
        where = f"audio_features.{name}"
        if name not in audio_features or name not in audio_lengths:
            raise UserError(where, "is absent", f"give features and lengths of {', '.join(encoder_widths)}")
        features, lengths = audio_features[name], audio_lengths[name]
        clips.add(len(lengths))
        if features.ndim != 2 or features.shape[1] != encoder_widths[name]:
            raise UserError(
                where,
                f"has shape {tuple(features.shape)}, the model reads (total_frames, {encoder_widths[name]})",
                "give features of the encoder that the model was made for",
            )
        if len(lengths) and int(lengths.min()) < 1:
            raise UserError(where, f"clip {int(lengths.argmin())} of the batch is empty", "leave empty clips out")
        if int(lengths.sum()) != len(features):
            raise UserError(where, f"{len(features)} frames for lengths that sum to {int(lengths.sum())}", "align them")
        # One reduction: a NaN or an infinity survives every sum.
        if not bool(torch.isfinite(features.detach().sum(dtype=torch.float32))):
            raise UserError(
                where, "holds NaN or infinite values", "prepare these clips again (`pal validate` finds them)"
            )
    if len(clips) > 1:
        raise UserError("audio_lengths", f"encoders hold different numbers of clips {sorted(clips)}", "align them")
    return clips.pop() if clips else 0
