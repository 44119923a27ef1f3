"""Cuts the audio of one clip into the windows that an encoder processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.audio.decode import Samples


class Windowing(Protocol):
    """The attributes of an encoder that determine how a clip is cut; see `Encoder`."""

    window_samples: int
    left_context: int
    right_context: int

    def num_frames(self, samples: int) -> int: ...


@dataclass(frozen=True)
class Window:
    """One input of an encoder.

    Attributes:
        audio: left context (zeros before the start of the clip), window and right context.
        samples: number of samples after the left context: the window and as much right context as the clip has.
    """

    audio: Samples
    samples: int


class Windower:
    """Cuts one clip into windows, segment by segment; their frames add up to those of the whole clip."""

    def __init__(self, encoder: Windowing) -> None:
        self._encoder = encoder
        self._buffer = np.zeros(encoder.left_context, np.float32)
        self._has_window = False

    def push(self, segment: Samples, last: bool) -> Iterator[Window]:
        """Yields the windows that this segment completes; all remaining ones when it is the last.

        A remainder too short for a frame is dropped, unless it is the whole clip.
        """
        encoder = self._encoder
        left, core, right = encoder.left_context, encoder.window_samples, encoder.right_context
        self._buffer = np.concatenate([self._buffer, segment])
        while len(self._buffer) - left >= core + right:
            yield self._window(self._buffer[: left + core + right])
            self._buffer = self._buffer[core:]
        remaining = len(self._buffer) - left
        while last and remaining > 0 and (encoder.num_frames(remaining) or not self._has_window):
            yield self._window(self._buffer[: left + core + right])
            self._buffer = self._buffer[core:]
            remaining = len(self._buffer) - left

    def _window(self, audio: Samples) -> Window:
        self._has_window = True
        return Window(audio, len(audio) - self._encoder.left_context)
