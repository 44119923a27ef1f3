"""The one interface of every encoder: windows with exact bookkeeping, batches, frames that are really audio."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.audio import Samples
from pipeline.features import EncoderContract

Features = npt.NDArray[np.float16]


class Encoder(ABC):
    """A frozen audio encoder.

    A clip is cut into windows of `window_samples`; a window also gets `left_context` samples before and up to
    `right_context` after it, so that encoders that look at neighbours (an STFT) see no edge inside a clip.

    Attributes:
        contract: how the features are made; `sample_rate_hz` and `width` are read from it.
        window_samples, left_context, right_context: see above, at the encoder's rate.
        pad_to_window: every window is padded to full length (a model of fixed input) rather than to the longest of
            its batch.
    """

    contract: EncoderContract
    window_samples: int
    left_context: int = 0
    right_context: int = 0
    pad_to_window: bool = True

    @abstractmethod
    def num_frames(self, samples: int) -> int:
        """Frames to store of a window with this many samples of audio (right context included); may be 0."""

    @abstractmethod
    def encode(self, audio_BL: Tensor, samples_B: Sequence[int]) -> Tensor:
        """Features (B, F, width) in float32 of windows (B, left_context + L).

        Each row is zero after left_context + samples; of row b the first num_frames(samples_B[b]) frames are kept, and
        must not depend on the other rows nor on the padding.
        """

    def encode_windows(self, windows: Sequence[Window]) -> list[Features]:
        """Float16 features (frames, width) of each window, padding dropped."""
        samples = [window.samples for window in windows]
        length = self.window_samples + self.right_context if self.pad_to_window else max(samples)
        audio_BL = torch.zeros(len(windows), self.left_context + length)
        for row, window in zip(audio_BL, windows, strict=True):
            row[: len(window.audio)] = torch.from_numpy(window.audio)
        with torch.inference_mode():
            features_BFD = self.encode(audio_BL, samples).float().cpu().numpy().astype(np.float16)
        return [features[: self.num_frames(n)] for features, n in zip(features_BFD, samples, strict=True)]


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
