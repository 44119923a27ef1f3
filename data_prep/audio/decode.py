"""Decodes audio files, or segments of them, to mono float32 at their own rate; defines reject reasons."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import soundfile

from data_prep.audio.containers import HEAD_BYTES, undecodable_format
from data_prep.audio.fragments import split_fragment
from data_prep.audio.lengths import Length, check_length
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
    "bad_segment",
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
# How far a segment may end behind the end of its file: what manifests that round to a tenth of a second need.
END_TOLERANCE_S = 0.05
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

    A path with a fragment (`a.flac#t=3,5.5`, see `fragments`) opens that segment: from the sample nearest to its start
    up to the one nearest to its end, with the same samples as in the whole file (MP3 in all but the last bit).

    Attributes:
        sample_rate_hz: sample rate of the file.
        duration_s: duration of what can be decoded; of the segment, where there is one.
        notes: what the user should know about a file that is accepted, by kind: `repaired` (its header states a wrong
            length or none), `silent` (all samples are equal; known after the last segment).

    Raises:
        Reject: the file is missing, unreadable, undecodable, truncated, empty, shorter than MIN_CLIP_S or above
            `max_clip_s`, or the segment is not within it.
    """

    def __init__(self, path: str, max_clip_s: float | None) -> None:
        path, self._start_s, self._end_s = split_fragment(path)
        try:
            self._source = open_audio(path)  # libsndfile does not report why it cannot open a file
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise Reject("missing" if missing else "unreadable", error.strerror or type(error).__name__) from error
        self.notes: dict[str, str] = {}
        self._cut: str | None = None  # what is known about a missing end of the file
        self._first = 0
        if not (self._is_segment and isinstance(self._source, str) and _is_known_intact(self._source)):
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
                self._frames = self._count_frames(self._end_s if self._is_segment else max_clip_s)
            if self._is_segment and self._frames:
                self._select_segment()
            self.duration_s: float = self._frames / self.sample_rate_hz
            self._check_length(max_clip_s)
        except Reject:
            self.close()
            raise

    @property
    def _is_segment(self) -> bool:
        return self._start_s is not None or self._end_s is not None

    def _select_segment(self) -> None:
        """Replaces the frames of the file by those of the segment."""
        rate_hz, available = self.sample_rate_hz, self._frames
        first = round((self._start_s or 0.0) * rate_hz)
        stop = available if self._end_s is None else round(self._end_s * rate_hz)
        if self._cut is not None and (self._end_s is None or stop > available):
            raise Reject("truncated", self._cut)
        if first >= available or stop > available + END_TOLERANCE_S * rate_hz or stop <= first:
            end = "the end" if self._end_s is None else f"{self._end_s:g} s"
            raise Reject(
                "bad_segment", f"from {self._start_s or 0:g} s to {end}, the file has {available / rate_hz:.2f} s"
            )
        self._first, self._frames = first, min(stop, available) - first

    def _repair(self) -> None:
        """Replaces the source by one whose header states the right length, where that of the file does not."""
        stream = open_file(self._source) if isinstance(self._source, str) else self._source
        length = check_length(stream)
        if length.is_cut and self._is_segment:
            self._cut, length = length.fault, Length()
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

    def _count_frames(self, limit_s: float | None) -> int:
        """Decodes a file of unknown length to count its frames, up to the first block above the limit."""
        self.notes["repaired"] = "the header states no length, counted by decoding"
        limit = UNKNOWN_FRAMES if limit_s is None else limit_s * self.sample_rate_hz
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

    def _seek(self) -> None:
        """Moves to the first frame of the segment; reads up to it where the format allows no seeking."""
        try:
            if self._first and self._file.seekable():
                self._file.seek(self._first)
                return
            skipped = 0
            while skipped < self._first:
                wanted = min(SEGMENT_S * self.sample_rate_hz, self._first - skipped)
                frames = len(self._file.read(wanted, dtype="float32"))
                if not frames:
                    raise Reject("truncated", f"ends after {skipped / self.sample_rate_hz:.2f} s")
                skipped += frames
        except soundfile.SoundFileError as error:
            raise Reject("undecodable", f"before {self._start_s:g} s: {_reason(error)}") from error

    def segments(self) -> Iterator[tuple[Samples, bool]]:
        """Yields mono segments of SEGMENT_S seconds (the last one may be shorter), each with whether it is the last.

        Channels are averaged.

        Raises:
            Reject: the file is undecodable further on, has fewer samples than its header states, has NaN or infinite
                samples, or channels that cancel when they are averaged.
        """
        total, done = self._frames, 0
        lowest, highest = np.inf, -np.inf
        start_s = self._first / self.sample_rate_hz
        self._seek()
        while done < total:
            wanted = min(SEGMENT_S * self.sample_rate_hz, total - done)
            try:
                segment = self._file.read(wanted, dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                at_s = start_s + done / self.sample_rate_hz
                raise Reject("undecodable", f"at {at_s:.1f} s: {_reason(error)}") from error
            if len(segment) < wanted:
                end_s = start_s + (done + len(segment)) / self.sample_rate_hz
                raise Reject("truncated", f"ends after {end_s:.2f} s of {start_s + self.duration_s:.2f} s")
            mono = segment[:, 0] if segment.shape[1] == 1 else segment.mean(axis=1, dtype=np.float32)
            end_s = start_s + (done + wanted) / self.sample_rate_hz
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


def _is_known_intact(path: str) -> bool:
    """Returns whether a local file has a right length; files with many segments are searched for faults once."""
    try:
        status = Path(path).stat()
        return _is_intact(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return False


@functools.lru_cache(maxsize=1024)
def _is_intact(path: str, size: int, modified_ns: int) -> bool:
    """Returns whether `check_length` has nothing to report; size and time are those of the file's current content."""
    with open_file(path) as stream:
        return check_length(stream) == Length()


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
