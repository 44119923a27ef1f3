"""LAION CLAP's audio tower (HTSAT) from transformers: a time-frequency grid per window of 10 s."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import ClapFeatureExtractor, ClapModel

from data_prep.audio.windows import Window
from data_prep.config import ClapConfig
from data_prep.encoders.base import Encoder
from data_prep.encoders.weights import to_device
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract


class Clap(Encoder):
    """Encodes to grid cells (time-major) before the pooling head, 32 x 2 per 10 s; short windows are repeated.

    Windows are never longer than the model's input, so its random crops do not occur, and `is_longer` is always False:
    the extractor itself would mark a random clip of each batch as longer.
    """

    def __init__(self, config: ClapConfig, contract: EncoderContract, path: Path, device: str) -> None:
        self.contract = contract
        self.pool = config.pool
        assert contract.grid is not None
        self._grid = contract.grid[0] * config.pool, contract.grid[1]
        self._extractor = ClapFeatureExtractor.from_pretrained(path)
        self.window_samples = self._extractor.nb_max_samples
        self._model = to_device(ClapModel.from_pretrained(path).audio_model, device, config.dtype, config.compile)

    def num_frames(self, samples: int) -> int:
        return -(-samples * self._grid[0] // self.window_samples) * self._grid[1]

    def prepare(self, window: Window) -> Tensor:
        """Returns log-mel (1 or 4 equal channels, frames, mels)."""
        mel = self._extractor(window.audio, sampling_rate=self._extractor.sampling_rate).input_features[0]
        return torch.as_tensor(mel, dtype=torch.float32)

    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        parameter = next(self._model.parameters())
        mel_BCFM = torch.stack(inputs).to(parameter.device, parameter.dtype)
        is_longer = torch.zeros(len(inputs), 1, dtype=torch.bool, device=parameter.device)
        cells_BDCT = self._model(mel_BCFM, is_longer=is_longer).last_hidden_state
        if cells_BDCT.shape[2:] != self._grid[::-1]:
            raise UserError(
                "encoders", f"CLAP returned a grid of {tuple(cells_BDCT.shape[2:])}", "check its config.json"
            )
        return cells_BDCT.permute(0, 3, 2, 1).flatten(1, 2)
