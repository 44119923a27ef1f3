"""The interface of every encoder: windows with exact frame counts, batches, and features without padding."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.audio.windows import Window
from pipeline.core.feature_contract import EncoderContract

Features = npt.NDArray[np.float16]


class Encoder(ABC):
    """A frozen audio encoder.

    A clip is cut into windows of `window_samples`; a window also gets `left_context` samples before and up to
    `right_context` after it, so that frames at its borders (of an STFT, for example) have no edge effects.

    Attributes:
        contract: how the features are made, `sample_rate_hz` and `width` among others.
        window_samples, left_context, right_context: samples at the encoder's rate; see above.
        pad_to_window: whether a short window costs as much as a full one (a model with fixed input length).
        pool: number of frames (time steps, for a grid) that are averaged into one stored frame.
    """

    contract: EncoderContract
    window_samples: int
    left_context: int = 0
    right_context: int = 0
    pad_to_window: bool = True
    pool: int = 1

    @abstractmethod
    def num_frames(self, samples: int) -> int:
        """Returns the frames, before pooling, of a window with this many samples (right context included); may be 0."""

    def prepare(self, window: Window) -> Tensor:
        """Returns the model input of one window, on the CPU; must be thread-safe."""
        return torch.from_numpy(window.audio)

    @abstractmethod
    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        """Returns the features (B, F, width) of a batch of prepared windows.

        The first num_frames(samples[b]) frames of row b are kept; they must not depend on other rows or on padding.
        """

    def encode_windows(self, inputs: list[Tensor], samples: list[int]) -> list[Features]:
        """Returns the float16 features (frames, width) of each prepared window, without padding, pooled."""
        with torch.inference_mode():
            features_BFD = self.encode(inputs, samples).float().cpu().numpy()
        return [
            self._pooled(features[: self.num_frames(n)]).astype(np.float16)
            for features, n in zip(features_BFD, samples, strict=True)
        ]

    def _pooled(self, features_FD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns means over `pool` time steps; the last group may be smaller."""
        if self.pool == 1 or not len(features_FD):
            return features_FD
        cells = self.contract.grid[1] if self.contract.grid else 1
        grid_TCD = features_FD.reshape(-1, cells, features_FD.shape[-1])
        groups = [grid_TCD[start : start + self.pool].mean(axis=0) for start in range(0, len(grid_TCD), self.pool)]
        return np.concatenate(groups)
