"""Decodes a streaming WAV block by block."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from data_prep.audio.decode import Reject, Samples


class WavStream:
    """A streaming WAV of 16-bit samples, read from a pipe.

    Attributes:
        sample_rate_hz: sample rate according to the header.

    Raises:
        Reject: the stream is not a WAV of 16-bit samples.
    """

    def __init__(self, source: BinaryIO) -> None:
        try:
            self._file = wave.open(source)  # noqa: SIM115 (the caller owns the pipe)
        except (wave.Error, EOFError) as error:
            raise Reject("undecodable", f"not a WAV: {error or 'the stream is empty'}") from error
        if self._file.getsampwidth() != 2:
            raise Reject("undecodable", f"{8 * self._file.getsampwidth()}-bit samples instead of 16-bit")
        self.sample_rate_hz = self._file.getframerate()

    def segments(self) -> Iterator[tuple[Samples, bool]]:
        """Yields mono segments of one second as they arrive, each with whether it is the last (which may be empty)."""
        channels, last = self._file.getnchannels(), False
        while not last:
            frames = np.frombuffer(self._file.readframes(self.sample_rate_hz), "<i2").reshape(-1, channels)
            last = len(frames) < self.sample_rate_hz
            samples = frames.astype(np.float32) / 2**15  # as libsndfile reads them
            yield samples[:, 0] if channels == 1 else samples.mean(axis=1, dtype=np.float32), last
