"""From an encoder's config to its contract (cheap) and to the encoder itself (loads its package and weights)."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from data_prep.config import EncoderConfig, LogMelConfig
from pipeline.features import EncoderContract

if TYPE_CHECKING:
    from data_prep.encoders.base import Encoder

RESAMPLER = "torchaudio sinc_interp_hann, lowpass_filter_width 6, rolloff 0.99"
SOFTWARE = ("soundfile", "torch", "torchaudio")


def describe_encoder(config: EncoderConfig) -> EncoderContract:
    """The contract of an encoder, without importing torch; reads (and hashes) weights where there are any.

    Raises:
        UserError: weights that do not exist or are of another kind.
    """
    sample_rate_hz, frame_rate_hz = config.sample_rate_hz, 1000 / (config.hop_ms * config.frames_per_token)
    return EncoderContract(
        kind=config.kind,
        revision="1",
        sample_rate_hz=sample_rate_hz,
        frame_rate_hz=frame_rate_hz,
        width=config.num_mels * config.frames_per_token,
        options={**config.model_dump(exclude={"kind", "sample_rate_hz"}), "resampler": RESAMPLER},
        software={name: version(name) for name in SOFTWARE},
    )


def build_encoder(config: EncoderConfig, contract: EncoderContract) -> Encoder:
    """Loads the encoder; call it once per process."""
    match config:
        case LogMelConfig():
            from data_prep.encoders.log_mel import LogMel

            return LogMel(config, contract)
