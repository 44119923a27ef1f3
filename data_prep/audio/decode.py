"""Decodes audio files and streaming WAV by segment to mono float32 at their own rate; defines reject reasons."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
import soundfile

from data_prep.audio.containers import HEAD_BYTES, undecodable_format
from data_prep.audio.lengths import check_length
from data_prep.files import open_audio, open_file

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
    "channels_cancel",
    "unsupported_rate",
    "too_large",
    "killed_worker",
]

# Decoded at once, so that a long file is never whole in memory. Features depend on it in their last bits.
SEGMENT_S = 30
# One analysis window of the usual encoders; shorter audio yields no frame.
MIN_CLIP_S = 0.025
# Channels cancel if their mean has less than this fraction of the power that independent channels would leave.
CANCELLED_POWER = 0.04
# Power (-60 dB of full scale) below which channels are noise, which may cancel by chance.
QUIET_POWER = 1e-6
UNKNOWN_FRAMES = 1 << 40  # libsndfile reports more for FLAC that was written into a pipe


class Reject(Exception):
    """A clip that cannot be encoded because of its file, not because of a bug."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _SequentialFile(soundfile.SoundFile):
    """A file of unknown length, in which libsndfile cannot seek; soundfile seeks after every read otherwise."""

    def seekable(self) -> bool:
        return False


class AudioFile:
    """An open audio file (anything libsndfile reads: WAV, FLAC, MP3, OGG Vorbis and Opus), read front to back.

    Attributes:
        sample_rate_hz: sample rate of the file.
        duration_s: duration of what can be decoded.
        notes: what the user should know about a file that is accepted, by kind: `repaired` (its header states a wrong
            length or none), `silent` (all samples are equal; known after the last segment).

    Raises:
        Reject: the file is missing, unreadable, undecodable, truncated, empty, shorter than MIN_CLIP_S or above
            `max_clip_s`.
    """

    def __init__(self, path: str, max_clip_s: float | None) -> None:
        try:
            self._source = open_audio(path)  # libsndfile does not report why it cannot open a file
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise Reject("missing" if missing else "unreadable", error.strerror or type(error).__name__) from error
        self.notes: dict[str, str] = {}
        self._repair()
        try:
            self._file = soundfile.SoundFile(self._source)
        except (soundfile.SoundFileError, TypeError) as error:
            detail = self._missing_decoder() or _reason(error)
            self._close_source()
            raise Reject("undecodable", detail) from error
        self.sample_rate_hz: int = self._file.samplerate
        self._frames: int = self._file.frames
        try:
            if self._frames > UNKNOWN_FRAMES:
                self._frames = self._count_frames(max_clip_s)
            self.duration_s: float = self._frames / self.sample_rate_hz
            self._check_length(max_clip_s)
        except Reject:
            self.close()
            raise

    def _repair(self) -> None:
        """Replaces the source by one whose header states the right length, where that of the file does not."""
        stream = open_file(self._source) if isinstance(self._source, str) else self._source
        length = check_length(stream)
        if length.fault is not None:
            stream.close()
            raise Reject("truncated", length.fault)
        if length.note is not None:
            self.notes["repaired"] = length.note
        if length.stream is not None:
            self._source = length.stream
        elif isinstance(self._source, str):
            stream.close()
        else:
            stream.seek(0)

    def _missing_decoder(self) -> str | None:
        """Returns which format libsndfile cannot decode, and a remedy; None if the format is unknown."""
        stream = open_file(self._source) if isinstance(self._source, str) else self._source
        stream.seek(0)
        name = undecodable_format(stream.read(HEAD_BYTES))
        stream.close()
        if name is None:
            return None
        return f"{name} is not decoded by libsndfile; convert it: ffmpeg -i INPUT OUTPUT.flac"

    def _count_frames(self, max_clip_s: float | None) -> int:
        """Decodes a file of unknown length to count its frames, up to the first segment above `max_clip_s`."""
        self.notes["repaired"] = "the header states no length, counted by decoding"
        limit = UNKNOWN_FRAMES if max_clip_s is None else max_clip_s * self.sample_rate_hz
        frames = 0
        self._reopen()
        try:
            while frames <= limit and (samples := len(self._file.read(SEGMENT_S * self.sample_rate_hz, "float32"))):
                frames += samples
        except soundfile.SoundFileError as error:
            raise Reject("undecodable", f"at {frames / self.sample_rate_hz:.1f} s: {_reason(error)}") from error
        self._reopen()
        return frames

    def _reopen(self) -> None:
        self._file.close()
        if not isinstance(self._source, str):
            self._source.seek(0)
        self._file = _SequentialFile(self._source)

    def _check_length(self, max_clip_s: float | None) -> None:
        if not self._frames:
            raise Reject("empty", "0 samples")
        if self.duration_s < MIN_CLIP_S:
            raise Reject("too_short", f"{self._frames} samples at {self.sample_rate_hz} Hz")
        if max_clip_s is not None and self.duration_s > max_clip_s:
            raise Reject("too_long", f"{self.duration_s:.1f} s")

    def segments(self) -> Iterator[tuple[Samples, bool]]:
        """Yields mono segments of SEGMENT_S seconds (the last one may be shorter), each with whether it is the last.

        Channels are averaged.

        Raises:
            Reject: the file is undecodable further on, has fewer samples than its header states, has NaN or infinite
                samples, or channels that cancel when they are averaged.
        """
        total, done = self._frames, 0
        lowest, highest = np.inf, -np.inf
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
            end_s = (done + wanted) / self.sample_rate_hz
            if not np.isfinite(mono).all():
                raise Reject("not_finite", f"NaN or infinite samples before {end_s:.1f} s")
            if done == 0 or wanted >= self.sample_rate_hz:  # a short remainder may cancel by chance
                _check_cancellation(segment, mono, end_s)
            lowest, highest = min(lowest, mono.min()), max(highest, mono.max())
            done += wanted
            if done == total and lowest == highest:
                self.notes["silent"] = f"all samples are {lowest:g}"
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


def _check_cancellation(segment: Samples, mono: Samples, end_s: float) -> None:
    """Rejects a segment whose channels are close to opposites, so that their mean is close to silence."""
    channels = segment.shape[1]
    if channels == 1:
        return
    power = float(np.square(segment).mean())
    if power > QUIET_POWER and float(np.square(mono).mean()) < CANCELLED_POWER / channels * power:
        raise Reject(
            "channels_cancel",
            f"the mean of the {channels} channels is close to silence before {end_s:.1f} s, the channels are not; "
            "store one of them: ffmpeg -i INPUT -af 'pan=mono|c0=c0' OUTPUT.flac",
        )


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
