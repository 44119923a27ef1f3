"""Cuts the audio of one clip into the windows that an encoder reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.audio.decode import Samples


class Windowing(Protocol):
    """What of an encoder decides how a clip is cut; see `Encoder`."""

    window_samples: int
    left_context: int
    right_context: int

    def num_frames(self, samples: int) -> int: ...


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

    def __init__(self, encoder: Windowing) -> None:
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
