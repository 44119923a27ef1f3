"""Turns audio into encoder inputs segment by segment: decodes, resamples, cuts into windows and prepares them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from data_prep.audio.decode import AudioFile, Samples
from data_prep.audio.resample import Resampler
from data_prep.audio.windows import Windower
from data_prep.encoders.base import Encoder


@dataclass(frozen=True)
class PreparedWindow:
    """The model input of one window, and its number of audio samples at the encoder's rate."""

    prepared: Tensor
    samples: int


@dataclass(frozen=True)
class Segment:
    """The windows that a segment of a clip completes, by encoder, and the duration and notes of the whole clip.

    Attributes:
        notes: see `AudioFile`; complete in the last segment.
    """

    windows: dict[str, list[PreparedWindow]]
    duration_s: float
    notes: dict[str, str] = field(default_factory=dict)


def preprocess_file(path: str, encoders: Mapping[str, Encoder], max_clip_s: float | None = None) -> Iterator[Segment]:
    """Yields all windows of a file for each of the encoders, front to back.

    Raises:
        Reject: the file cannot be encoded; see `AudioFile`.
    """
    with AudioFile(path, max_clip_s) as file:
        for windows in preprocess_segments(file.segments(), file.sample_rate_hz, encoders):
            yield Segment(windows, file.duration_s, file.notes)


def preprocess_segments(
    segments: Iterable[tuple[Samples, bool]], sample_rate_hz: int, encoders: Mapping[str, Encoder]
) -> Iterator[dict[str, list[PreparedWindow]]]:
    """Yields, for each segment, the windows that it completes, by encoder.

    Args:
        segments: mono audio at `sample_rate_hz`, each with whether it is the last.
    """
    rates_hz = {encoder.contract.sample_rate_hz for encoder in encoders.values()}
    resamplers = {rate_hz: Resampler(sample_rate_hz, rate_hz) for rate_hz in sorted(rates_hz)}
    windowers = {name: Windower(encoder) for name, encoder in encoders.items()}
    for samples, last in segments:
        audio = {rate_hz: resampler.push(samples, last) for rate_hz, resampler in resamplers.items()}
        yield {
            name: [
                PreparedWindow(encoder.prepare(window), window.samples)
                for window in windowers[name].push(audio[encoder.contract.sample_rate_hz], last)
            ]
            for name, encoder in encoders.items()
        }
