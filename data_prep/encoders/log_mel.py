"""Stacked log-mel frames: the encoder without weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

from data_prep.config import LogMelConfig
from data_prep.encoders.base import Encoder
from pipeline.core.feature_contract import EncoderContract

WINDOW_S = 30  # bounds memory only: windows overlap by their context, so their borders do not affect the features
POWER_FLOOR = 1e-6


class LogMel(Encoder):
    """(log(mel power + 1e-6) - mean) / std; frame t is centred on sample t * hop; audio is zero outside the clip.

    As torchaudio's MelSpectrogram with center=True and pad_mode="constant", for ceil(samples / hop) frames, of which
    `frames_per_token` neighbours make one stored frame (the last one padded with frames of silence).
    """

    pad_to_window = False

    def __init__(self, config: LogMelConfig, contract: EncoderContract) -> None:
        self.contract = contract
        self._config = config
        self._hop = round(config.hop_ms * config.sample_rate_hz / 1000)
        self._window = round(config.window_ms * config.sample_rate_hz / 1000)
        self._token = self._hop * config.frames_per_token
        self.window_samples = WINDOW_S * config.sample_rate_hz // self._token * self._token
        self.left_context = self._window // 2
        self.right_context = self._window - self._window // 2
        self._mel = MelSpectrogram(
            sample_rate=config.sample_rate_hz,
            n_fft=self._window,
            hop_length=self._hop,
            n_mels=config.num_mels,
            center=False,
        )

    def num_frames(self, samples: int) -> int:
        return -(-min(samples, self.window_samples) // self._token)

    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        tokens = max(self.num_frames(n) for n in samples)
        needed = (tokens * self._config.frames_per_token - 1) * self._hop + self._window
        audio_BL = torch.stack([F.pad(audio[:needed], (0, max(0, needed - len(audio)))) for audio in inputs])
        log_mel_BMF = (self._mel(audio_BL) + POWER_FLOOR).log()
        normalised_BFM = ((log_mel_BMF - self._config.mean) / self._config.std).transpose(1, 2)
        return normalised_BFM.reshape(len(audio_BL), tokens, -1)
