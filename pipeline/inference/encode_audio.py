"""From an audio file to the features that a model understands: the one door from here to data_prep's encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.audio.decode import AudioFile, Reject, WavStream
from data_prep.config import LogMelConfig
from data_prep.encoders.base import Encoder
from data_prep.encoders.build import build_encoder, config_of, describe_encoder
from data_prep.encoders.inputs import PreparedWindow, cut_windows, decode
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

T = TypeVar("T")

SPECTROGRAM_HIGHEST_HZ = 8000.0
READ_AHEAD_S = 120


@dataclass(frozen=True)
class Sound:
    """An audio file as a model hears it: encoder -> (frames, width) float16."""

    features: dict[str, NDArray[np.float16]]
    duration_s: float


class AudioEncoders:
    """The encoders that made the features which a model was trained on.

    Args:
        contracts: encoder -> how its features were made.
        weights: encoder -> folder, file or Hub name of its weights, where they moved.
        device: `cpu` or `cuda`.

    Attributes:
        frame_rates_hz: encoder -> frames a second of its features.

    Raises:
        UserError: an encoder that cannot be had, or that would make other features.
    """

    def __init__(self, contracts: Mapping[str, EncoderContract], weights: Mapping[str, str], device: str) -> None:
        for name in weights:
            if name not in contracts:
                raise UserError("--encoder", f"the model has no encoder '{name}'", f"it has {', '.join(contracts)}")
        self.frame_rates_hz = {name: contract.frame_rate_hz for name, contract in contracts.items()}
        self._encoders: dict[str, Encoder] = {}
        for name, contract in contracts.items():
            config = config_of(contract, weights.get(name))
            found = describe_encoder(config)
            if found.fingerprint != contract.fingerprint:
                fault = f"makes features with fingerprint {found.fingerprint}, the model wants {contract.fingerprint}"
                raise UserError(f"encoder '{name}'", fault, "give the same weights with --encoder NAME=FOLDER")
            self._encoders[name] = build_encoder(config, found, device)

    def encode(self, file: Path) -> Sound:
        """Features of an audio file, as preparation makes them.

        Raises:
            UserError: the file cannot be read, or gives no features.
        """
        return _encode(file, self._encoders)

    def encode_stream(self, source: BinaryIO) -> Iterator[dict[str, list[NDArray[np.float16]]]]:
        """Features of audio that still arrives, as a WAV: encoder -> windows that each further second completes.

        A thread takes the samples as they come, up to READ_AHEAD_S before they are wanted: a microphone cannot wait
        until a question is answered. The features are those of `hear`, but for the last bits where the sample rate is
        not the encoder's.

        Raises:
            UserError: it is no WAV of 16-bit samples.
        """
        place = "standard input"
        try:
            stream = WavStream(source)
        except Reject as reject:
            fault = f"cannot be heard ({reject.detail})"
            raise UserError(place, fault, "pipe a WAV into it: ffmpeg -i SOURCE -c:a pcm_s16le -f wav -") from None
        segments = read_ahead(stream.segments(), READ_AHEAD_S)
        for windows in cut_windows(segments, stream.sample_rate_hz, self._encoders):
            yield _features(windows, self._encoders, place)


def read_ahead(items: Iterator[T], most: int) -> Iterator[T]:
    """The same items, taken by a thread as they come, up to `most` before they are wanted."""
    waiting: Queue[tuple[T] | Exception | None] = Queue(most)

    def take() -> None:
        try:
            for item in items:
                waiting.put((item,))
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    Thread(target=take, daemon=True).start()  # a daemon: it may wait for a source that never ends
    while (taken := waiting.get()) is not None:
        if isinstance(taken, Exception):
            raise taken
        yield taken[0]


def duration_s(file: Path) -> float:
    """Length of an audio file, as its header says.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with AudioFile(str(file), None) as audio:
            return audio.duration_s
    except Reject as reject:
        raise _unusable(file, reject) from None


def spectrogram(file: Path) -> NDArray[np.float32]:
    """Log-mel spectrogram of an audio file, (columns of 10 ms, 64 mel bins up to SPECTROGRAM_HIGHEST_HZ).

    Raises:
        UserError: the file cannot be read.
    """
    config = LogMelConfig(frames_per_token=1)
    encoder = build_encoder(config, describe_encoder(config), "cpu")
    return _encode(file, {"log_mel": encoder}).features["log_mel"].astype(np.float32)


def _encode(file: Path, encoders: Mapping[str, Encoder]) -> Sound:
    windows: dict[str, list[NDArray[np.float16]]] = {name: [] for name in encoders}
    duration_s = 0.0
    try:
        for segment in decode(str(file), encoders):
            duration_s = segment.duration_s
            for name, features in _features(segment.windows, encoders, file).items():
                windows[name] += features
    except Reject as reject:
        raise _unusable(file, reject) from None
    for name, parts in windows.items():
        if not sum(map(len, parts)):
            raise UserError(file, f"is too short for a frame of encoder '{name}'", "give another audio file")
    return Sound({name: np.concatenate(parts) for name, parts in windows.items()}, duration_s)


def _features(
    prepared: Mapping[str, list[PreparedWindow]], encoders: Mapping[str, Encoder], place: object
) -> dict[str, list[NDArray[np.float16]]]:
    """Encoder -> features of each of its windows."""
    features = {
        name: [f for w in windows for f in encoders[name].encode_windows([w.prepared], [w.samples])]
        for name, windows in prepared.items()
    }
    for name, windows in features.items():
        if not all(np.isfinite(window).all() for window in windows):
            raise UserError(place, f"gives values beyond float16 of encoder '{name}'", "give another audio file")
    return features


def _unusable(place: object, reject: Reject) -> UserError:
    return UserError(place, f"is {reject.reason.replace('_', ' ')} ({reject.detail})", "give another audio file")
