"""The trainable audio side of a model: each stream's connector, and its projections or blocks at its layers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.streams import Stream
from pipeline.model.configuration import PalConfig
from pipeline.model.connectors import build_connector
from pipeline.model.layers import FlamingoBlock, KeyValueGain, Mlp


def token_width(spec: Stream, encoder_width: int, hidden: int) -> int:
    """Returns the width of a stream's audio tokens.

    By default the language model's for tokens in the sequence; beside it, the narrower of the encoder's and that.
    """
    if spec.connector.width is not None:
        return spec.connector.width
    return hidden if spec.integration == "plits" else min(encoder_width, hidden)


class AudioStream(nn.Module):
    """A `connector`, and at the stream's audio layers `layer_projections` (LAL: P_l), with `layer_gains` if it has a
    gain, or `layer_blocks` (flamingo)."""

    def __init__(self, spec: Stream, config: PalConfig) -> None:
        super().__init__()
        self.spec = spec
        language_model = config.language_model
        hidden = language_model.hidden_size
        widths = [config.encoder_widths[name] for name in spec.encoders]
        grids = [config.encoder_grids.get(name) for name in spec.encoders]
        width = token_width(spec, widths[0], hidden)
        if spec.integration == "plits" and width != hidden:
            raise UserError(
                "model.connector.width",
                f"{width} is not the language model's width {hidden}, which tokens in the sequence need",
                "leave it out for plits",
            )
        self.connector = build_connector(spec.connector, widths, grids, width)
        projected = spec.audio_layers if spec.integration == "lal" else ()
        self.layer_projections = nn.ModuleDict({str(layer): Mlp(width, hidden) for layer in projected})
        gains = {str(layer): KeyValueGain(spec.gain) for layer in projected if spec.gain is not None}
        self.layer_gains = nn.ModuleDict(gains)
        crossed = spec.audio_layers if spec.integration == "flamingo" else ()
        heads = language_model.num_attention_heads
        self.layer_blocks = nn.ModuleDict({str(layer): FlamingoBlock(hidden, width, heads) for layer in crossed})


def initialise(module: nn.Module, name: str) -> None:
    """Draws a module's own parameters from a generator seeded by torch's seed and the module's name in the model.

    Two models built with one seed therefore share the values of same-named parameters of equal shape, whatever else
    they contain: their comparison starts from the same point.
    """
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:  # containers and activations have none
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
            reset()


@dataclass(frozen=True)
class AudioTokens:
    """The connectors' output for a batch's clips; one entry for each stream.

    Attributes:
        tokens: (N, W) audio tokens of all clips, one after the other.
        counts: (C,) number of audio tokens of each clip, on the CPU.
        frames: (C,) number of frames that they were made of, on the CPU.
        dummy_clip: the batch holds no clip; `tokens` come from one frame of silence, so that every rank runs every
            module.
    """

    tokens: list[Tensor]
    counts: list[Tensor]
    frames: list[Tensor]
    dummy_clip: bool

    @property
    def num_clips(self) -> int:
        return 0 if self.dummy_clip or not self.counts else len(self.counts[0])


def run_connectors(
    streams: Sequence[AudioStream],
    encoder_widths: dict[str, int],
    features: dict[str, Tensor] | None,
    lengths: dict[str, Tensor] | None,
    like: Tensor,
) -> AudioTokens:
    """Runs every connector, on a dummy clip of silence if the batch holds no clip.

    Args:
        features, lengths: `audio_features` and `audio_lengths` of `PalForCausalLM.forward`.
        like: a parameter, for device and dtype.

    Raises:
        UserError: see `check_features`.
    """
    cpu_lengths = {name: n.cpu() for name, n in (lengths or {}).items()}
    specs = [s.spec for s in streams]
    dummy_clip = not any(len(n) for n in cpu_lengths.values())
    features = features or {}
    if dummy_clip:
        features = {name: torch.zeros(1, width, device=like.device) for name, width in encoder_widths.items()}
        cpu_lengths = {name: torch.ones(1, dtype=torch.long) for name in encoder_widths}
        for stream in streams:
            for name, bands in zip(stream.spec.encoders, stream.connector.frames_of_a_step(), strict=True):
                features[name] = features[name].new_zeros(bands, encoder_widths[name])
                cpu_lengths[name] = torch.tensor([bands])
    else:
        check_features(specs, encoder_widths, features, cpu_lengths)
    tokens, counts, frames = [], [], []
    for stream in streams:
        stream_lengths = [cpu_lengths[name] for name in stream.spec.encoders]
        stream_features = [features[name].to(like.dtype) for name in stream.spec.encoders]
        tokens.append(stream.connector(stream_features, stream_lengths))
        counts.append(stream.connector.token_counts(stream_lengths))
        frames.append(stream_lengths[0])
    return AudioTokens(tokens, counts, frames, dummy_clip)


def check_features(
    streams: Sequence[Stream],
    encoder_widths: dict[str, int],
    audio_features: dict[str, Tensor],
    audio_lengths: dict[str, Tensor],
) -> None:
    """Checks a batch's audio features against the streams.

    Raises:
        UserError: an encoder is absent, a width is wrong, frames and lengths disagree, a clip is empty, encoders
            have different numbers of clips, or features are not finite.
    """
    clips = {}
    for name in dict.fromkeys(name for s in streams for name in s.encoders):
        where = f"audio_features.{name}"
        if name not in audio_features or name not in audio_lengths:
            raise UserError(where, "is absent", f"pass features and lengths of {', '.join(encoder_widths)}")
        features, lengths = audio_features[name], audio_lengths[name]
        clips[name] = len(lengths)
        if features.ndim != 2 or features.shape[1] != encoder_widths[name]:
            raise UserError(
                where,
                f"has shape {tuple(features.shape)}, the model reads (total_frames, {encoder_widths[name]})",
                "pass features of the encoder that the model was trained on",
            )
        if len(lengths) and int(lengths.min()) < 1:
            raise UserError(where, f"clip {int(lengths.argmin())} of the batch is empty", "leave out empty clips")
        if int(lengths.sum()) != len(features):
            raise UserError(where, f"{len(features)} frames for lengths that sum to {int(lengths.sum())}", "align them")
        # One reduction: a NaN or an infinity survives every sum. Not on an accelerator, where the check would wait for
        # the device: there such features show in the loss.
        if features.device.type == "cpu" and not bool(torch.isfinite(features.sum(dtype=torch.float32))):
            raise UserError(where, "holds NaN or infinite values", "prepare these clips again")
    if len(set(clips.values())) > 1:
        raise UserError("audio_lengths", f"encoders hold different numbers of clips: {clips}", "align them")
