"""Decodes audio files by segment: mono float32 at the rate an encoder wants. Owns the reasons to reject a clip."""

from __future__ import annotations

import errno
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torchaudio.transforms import Resample

Samples = npt.NDArray[np.float32]
RejectReason = Literal[
    "missing",
    "unreadable",
    "outside_root",
    "duplicate_id",
    "undecodable",
    "truncated",
    "empty",
    "too_short",
    "too_long",
    "not_finite",
    "unsupported_rate",
    "too_large",
    "killed_worker",
]

# Decoded at once; a longer file is never whole in memory. A part of what makes features reproducible to the last bit.
SEGMENT_S = 30
# One analysis window of the usual encoders; less audio than that has no frame of its own.
MIN_CLIP_S = 0.025
# Coefficients of a polyphase filter; only rates with hardly a common divisor (44101 -> 16000 Hz) need more.
MAX_FILTER_SIZE = 1 << 25


class Reject(Exception):
    """A clip that cannot become features, through no fault of the program."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class AudioFile:
    """An open audio file (anything libsndfile reads: WAV, FLAC, MP3, OGG Vorbis and Opus), read front to back.

    Attributes:
        sample_rate_hz: of the file.
        duration_s: as its header says.

    Raises:
        Reject: missing, unreadable, undecodable, empty, shorter than MIN_CLIP_S, longer than `max_clip_s`.
    """

    def __init__(self, path: str, max_clip_s: float | None) -> None:
        try:
            Path(path).open("rb").close()  # libsndfile does not tell why it cannot open a file
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            raise Reject("missing" if missing else "unreadable", str(error.strerror)) from error
        try:
            self._file = soundfile.SoundFile(path)
        except (soundfile.SoundFileError, TypeError) as error:
            raise Reject("undecodable", _reason(error)) from error
        self.sample_rate_hz: int = self._file.samplerate
        self.duration_s: float = self._file.frames / self.sample_rate_hz
        try:
            self._check_length(max_clip_s)
        except Reject:
            self.close()
            raise

    def _check_length(self, max_clip_s: float | None) -> None:
        if not self._file.frames:
            raise Reject("empty", "0 samples")
        if self.duration_s < MIN_CLIP_S:
            raise Reject("too_short", f"{self._file.frames} samples at {self.sample_rate_hz} Hz")
        if max_clip_s is not None and self.duration_s > max_clip_s:
            raise Reject("too_long", f"{self.duration_s:.1f} s")

    def segments(self) -> Iterator[tuple[Samples, bool]]:
        """Yields mono segments of SEGMENT_S seconds (the last one shorter) and whether it is the last.

        Channels are averaged.

        Raises:
            Reject: undecodable further on, fewer samples than the header promises, NaN or infinite samples.
        """
        total, done = self._file.frames, 0
        while done < total:
            wanted = min(SEGMENT_S * self.sample_rate_hz, total - done)
            try:
                segment = self._file.read(wanted, dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                raise Reject("undecodable", f"at {done / self.sample_rate_hz:.1f} s: {_reason(error)}") from error
            if len(segment) < wanted:
                end_s = (done + len(segment)) / self.sample_rate_hz
                raise Reject("truncated", f"ends after {end_s:.2f} s of {self.duration_s:.2f} s")
            mono = segment[:, 0] if segment.shape[1] == 1 else segment.mean(axis=1, dtype=np.float32)
            if not np.isfinite(mono).all():
                raise Reject(
                    "not_finite", f"NaN or infinite samples before {(done + wanted) / self.sample_rate_hz:.1f} s"
                )
            done += wanted
            yield np.ascontiguousarray(mono), done == total

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
