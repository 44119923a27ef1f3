"""Resampling of clips that arrive in segments, by torchaudio."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torchaudio.transforms import Resample

from data_prep.audio.decode import Reject, Samples

# Coefficients of a polyphase filter; only rates with hardly a common divisor (44101 -> 16000 Hz) need more.
MAX_FILTER_SIZE = 1 << 25


class Resampler:
    """Resamples a clip that arrives in segments; equal to resampling it whole, but for the last bits.

    torchaudio's band-limited sinc filter (its defaults; part of every encoder contract). Each segment is filtered with
    a margin of its neighbours, so that no edge falls inside a clip.

    Raises:
        Reject: the two rates have so small a common divisor that the filter would not fit in memory.
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
        self._before = 0  # leading samples of the buffer that are already done and only serve as margin

    def push(self, segment: Samples, last: bool) -> Samples:
        """The samples at the new rate that this segment completes; all the rest when it is the last."""
        if self._same:
            return segment
        buffer = np.concatenate([self._buffer, segment])
        if last:
            ready = len(buffer)
        else:  # whole filter periods that have a full margin after them
            ready = self._before + max(0, len(buffer) - self._margin - self._before) // self._from * self._from
        if ready == self._before:
            self._buffer = buffer
            return np.zeros(0, np.float32)
        out = self._resample(torch.from_numpy(buffer)).numpy()
        stop = len(out) if last else ready // self._from * self._to
        out = out[self._before // self._from * self._to : stop]
        keep = min(ready, self._margin)
        self._buffer, self._before = buffer[ready - keep :], keep
        return out


@functools.lru_cache(maxsize=64)
def _torchaudio_resample(from_hz: int, to_hz: int) -> Resample:
    return Resample(from_hz, to_hz)
