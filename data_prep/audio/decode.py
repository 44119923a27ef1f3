"""Decodes audio files and streaming WAV by segment to mono float32 at their own rate; defines reject reasons."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
import soundfile

from data_prep.files import open_audio

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

# Decoded at once, so that a long file is never whole in memory. Features depend on it in their last bits.
SEGMENT_S = 30
# One analysis window of the usual encoders; shorter audio yields no frame.
MIN_CLIP_S = 0.025


class Reject(Exception):
    """A clip that cannot be encoded because of its file, not because of a bug."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class AudioFile:
    """An open audio file (anything libsndfile reads: WAV, FLAC, MP3, OGG Vorbis and Opus), read front to back.

    Attributes:
        sample_rate_hz: sample rate of the file.
        duration_s: duration according to the header.

    Raises:
        Reject: the file is missing, unreadable, undecodable, empty, shorter than MIN_CLIP_S or above `max_clip_s`.
    """

    def __init__(self, path: str, max_clip_s: float | None) -> None:
        try:
            self._source = open_audio(path)  # libsndfile does not report why it cannot open a file
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise Reject("missing" if missing else "unreadable", error.strerror or type(error).__name__) from error
        try:
            self._file = soundfile.SoundFile(self._source)
        except (soundfile.SoundFileError, TypeError) as error:
            self._close_source()
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
        """Yields mono segments of SEGMENT_S seconds (the last one may be shorter), each with whether it is the last.

        Channels are averaged.

        Raises:
            Reject: the file is undecodable further on, has fewer samples than its header states, or has NaN or infinite
                samples.
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
        """Closes the file."""
        self._file.close()
        self._close_source()

    def _close_source(self) -> None:
        if not isinstance(self._source, str):
            self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
