"""Resamples clips segment by segment with torchaudio."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torchaudio.transforms import Resample

from data_prep.audio.decode import Reject, Samples

# Coefficients of the polyphase filter; only rates with a tiny common divisor (44101 -> 16000 Hz) need more.
MAX_FILTER_SIZE = 1 << 25


class Resampler:
    """Resamples one clip segment by segment; the result equals resampling it whole up to the last bits.

    Uses torchaudio's band-limited sinc filter with its defaults, which are part of every encoder contract. Each segment
    is filtered with a margin of its neighbours, so that there are no edge effects inside a clip.

    Raises:
        Reject: the common divisor of the two rates is so small that the filter would not fit in memory.
    """

    def __init__(self, from_hz: int, to_hz: int) -> None:
        divisor = math.gcd(from_hz, to_hz)
        self._from, self._to = from_hz // divisor, to_hz // divisor
        self._same = from_hz == to_hz
        if self._same:
            return
        # Half width of the filter in input samples: 6 zero crossings at the lower of the two rates, roll-off 0.99.
        half_width = math.ceil(6 * self._from / (min(self._from, self._to) * 0.99))
        if self._to * (2 * half_width + self._from) > MAX_FILTER_SIZE:
            raise Reject("unsupported_rate", f"{from_hz} Hz cannot be resampled to {to_hz} Hz")
        self._margin = self._from * math.ceil((half_width + 1) / self._from)
        self._resample = _torchaudio_resample(from_hz, to_hz)
        self._buffer = np.zeros(0, np.float32)
        self._consumed = 0  # leading samples of the buffer that were output already and only serve as margin

    def push(self, segment: Samples, last: bool) -> Samples:
        """Returns the samples at the new rate that this segment completes; all remaining ones when it is the last."""
        if self._same:
            return segment
        buffer = np.concatenate([self._buffer, segment])
        if last:
            ready = len(buffer)
        else:  # whole filter periods that have a full margin after them
            ready = self._consumed + max(0, len(buffer) - self._margin - self._consumed) // self._from * self._from
        if ready == self._consumed:
            self._buffer = buffer
            return np.zeros(0, np.float32)
        out = self._resample(torch.from_numpy(buffer)).numpy()
        stop = len(out) if last else ready // self._from * self._to
        out = out[self._consumed // self._from * self._to : stop]
        keep = min(ready, self._margin)
        self._buffer, self._consumed = buffer[ready - keep :], keep
        return out


@functools.lru_cache(maxsize=64)
def _torchaudio_resample(from_hz: int, to_hz: int) -> Resample:
    return Resample(from_hz, to_hz)
