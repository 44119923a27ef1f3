"""The one interface of every encoder: windows with exact bookkeeping, batches, frames that are really audio."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.audio.decode import Samples
from pipeline.core.feature_contract import EncoderContract

Features = npt.NDArray[np.float16]


class Encoder(ABC):
    """A frozen audio encoder.

    A clip is cut into windows of `window_samples`; a window also gets `left_context` samples before and up to
    `right_context` after it, so that encoders that look at neighbours (an STFT) see no edge inside a clip.

    Attributes:
        contract: how the features are made; `sample_rate_hz` and `width` are read from it.
        window_samples, left_context, right_context: see above, at the encoder's rate.
        pad_to_window: a window costs as much as a full one (a model of fixed input).
        pool: frames (time steps, for a grid) that are averaged into one stored frame.
    """

    contract: EncoderContract
    window_samples: int
    left_context: int = 0
    right_context: int = 0
    pad_to_window: bool = True
    pool: int = 1

    @abstractmethod
    def num_frames(self, samples: int) -> int:
        """Frames, before pooling, of a window with this many samples of audio (right context included); may be 0."""

    def prepare(self, window: Window) -> Tensor:
        """The input of one window, on the CPU; several threads call it."""
        return torch.from_numpy(window.audio)

    @abstractmethod
    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        """Features (B, F, width) of a batch of prepared windows.

        Of row b the first num_frames(samples[b]) frames are kept; they must not depend on other rows nor on padding.
        """

    def encode_windows(self, inputs: list[Tensor], samples: list[int]) -> list[Features]:
        """Float16 features (frames, width) of each prepared window, padding dropped, then pooled."""
        with torch.inference_mode():
            features_BFD = self.encode(inputs, samples).float().cpu().numpy()
        return [
            self._pooled(features[: self.num_frames(n)]).astype(np.float16)
            for features, n in zip(features_BFD, samples, strict=True)
        ]

    def _pooled(self, features_FD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Means over `pool` time steps; the last group has the steps that are left."""
        if self.pool == 1 or not len(features_FD):
            return features_FD
        cells = self.contract.grid[1] if self.contract.grid else 1
        grid_TCD = features_FD.reshape(-1, cells, features_FD.shape[-1])
        groups = [grid_TCD[start : start + self.pool].mean(axis=0) for start in range(0, len(grid_TCD), self.pool)]
        return np.concatenate(groups)


@dataclass(frozen=True)
class Window:
    """One input of an encoder: `audio` is left context, window and right context; zeros before a clip's start.

    Attributes:
        samples: audio after the left context: the window itself and as much right context as the clip has.
    """

    audio: Samples
    samples: int


class Windower:
    """Cuts one clip, arriving in segments at the encoder's rate, into windows. Total frames are those of the clip."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._buffer = np.zeros(encoder.left_context, np.float32)
        self._any = False

    def push(self, segment: Samples, last: bool) -> Iterator[Window]:
        """Yields the windows that this segment completes; all that remain when it is the last.

        A rest too short for a frame of its own is dropped, unless it is the whole clip.
        """
        encoder = self._encoder
        left, core, right = encoder.left_context, encoder.window_samples, encoder.right_context
        self._buffer = np.concatenate([self._buffer, segment])
        while len(self._buffer) - left >= core + right:
            yield self._window(self._buffer[: left + core + right])
            self._buffer = self._buffer[core:]
        rest = len(self._buffer) - left
        while last and rest > 0 and (encoder.num_frames(rest) or not self._any):
            yield self._window(self._buffer[: left + core + right])
            self._buffer = self._buffer[core:]
            rest = len(self._buffer) - left

    def _window(self, audio: Samples) -> Window:
        self._any = True
        return Window(audio, len(audio) - self._encoder.left_context)
