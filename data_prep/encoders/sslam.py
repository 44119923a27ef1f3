"""The SSLAM encoder: Kaldi filterbank windows of 1024 frames through a vision transformer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.compliance import kaldi

from data_prep.audio.windows import Window
from data_prep.config import SslamConfig
from data_prep.encoders.base import Encoder
from data_prep.encoders.sslam_vit import PATCH, load_sslam
from data_prep.encoders.weights import read_tensors, to_device, torch_dtype
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

# Preprocessing of EAT and SSLAM: 16 kHz, 25 ms windows every 10 ms, AudioSet's mean and twice its standard deviation.
RATE_HZ = 16000
FRAME, HOP = 400, 160
WINDOW_FRAMES = 1024
MELS = 128
MEAN, STD = -4.268, 4.569


class Sslam(Encoder):
    """Encodes to grid cells (time-major), 64 x 8 per 10.24 s; rows of 160 ms without any audio are dropped.

    The mean is subtracted per window, not per clip: the filterbank subtracts it from each of its frames anyway.
    """

    window_samples = WINDOW_FRAMES * HOP
    right_context = FRAME - HOP  # the last frame of a window reaches into the next

    def __init__(self, config: SslamConfig, contract: EncoderContract, path: Path, device: str) -> None:
        self.contract = contract
        self.pool = config.pool
        self._layer = config.layer
        self._device, self._dtype = device, torch_dtype(config.dtype)
        model = load_sslam(dict(read_tensors(path)), config.num_heads, path)
        if config.layer is not None and config.layer > len(model.blocks):
            raise UserError("layer", f"{config.layer} of {len(model.blocks)}", "choose a block of the encoder")
        self._model = to_device(model, device, config.dtype, config.compile)

    def num_frames(self, samples: int) -> int:
        frames = min(WINDOW_FRAMES, (samples - FRAME) // HOP + 1) if samples >= FRAME else 0
        return -(-frames // PATCH) * (MELS // PATCH)

    def prepare(self, window: Window) -> Tensor:
        """Returns the normalised filterbank (1024, 128); frames after the audio are zero before normalisation."""
        audio = torch.from_numpy(window.audio)
        mel_FM = kaldi.fbank(
            (audio - audio.mean())[None],
            sample_frequency=RATE_HZ,
            num_mel_bins=MELS,
            window_type="hanning",
            frame_shift=10,
            dither=0.0,
            htk_compat=True,
            use_energy=False,
        )[:WINDOW_FRAMES]
        return (F.pad(mel_FM, (0, 0, 0, WINDOW_FRAMES - len(mel_FM))) - MEAN) / (2 * STD)

    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        return self._model(torch.stack(inputs).to(self._device, self._dtype), self._layer)
