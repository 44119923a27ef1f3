"""Encodes audio files and streams into the features that a model was trained on, with data_prep's encoders.

No other module of `pipeline` imports data_prep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.audio.decode import AudioFile, Reject
from data_prep.audio.wav_stream import WavStream
from data_prep.config import LogMelConfig
from data_prep.encoders.base import Encoder
from data_prep.encoders.build import build_encoder, config_from_contract, describe_encoder
from data_prep.encoders.preprocessing import PreparedWindow, preprocess_file, preprocess_segments
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

T = TypeVar("T")

SPECTROGRAM_HIGHEST_HZ = 8000.0
_READ_AHEAD_S = 120


@dataclass(frozen=True)
class EncodedAudio:
    """The features of an audio file.

    Attributes:
        features: encoder -> (frames, width) float16.
        duration_s: duration of the file.
    """

    features: dict[str, NDArray[np.float16]]
    duration_s: float


class AudioEncoders:
    """The encoders that made the features on which a model was trained.

    Args:
        contracts: encoder -> how its features were made.
        weights: encoder -> folder, file or Hub name of its weights, where they have moved.
        device: `cpu` or `cuda`.

    Attributes:
        frame_rates_hz: encoder -> frame rate of its features.

    Raises:
        UserError: an encoder is not available, or would make other features.
    """

    def __init__(self, contracts: Mapping[str, EncoderContract], weights: Mapping[str, str], device: str) -> None:
        for name in weights:
            if name not in contracts:
                raise UserError("--encoder", f"the model has no encoder '{name}'", f"it has {', '.join(contracts)}")
        self.frame_rates_hz = {name: contract.frame_rate_hz for name, contract in contracts.items()}
        self._encoders: dict[str, Encoder] = {}
        for name, contract in contracts.items():
            config = config_from_contract(contract, weights.get(name))
            actual = describe_encoder(config)
            if actual.fingerprint != contract.fingerprint:
                fault = f"makes features with fingerprint {actual.fingerprint}, "
                fault += f"the model was trained on {contract.fingerprint}"
                raise UserError(f"encoder '{name}'", fault, "give the same weights with --encoder NAME=FOLDER")
            self._encoders[name] = build_encoder(config, actual, device)

    def encode(self, file: Path) -> EncodedAudio:
        """Encodes an audio file into the features that preparation makes of it.

        Raises:
            UserError: the file cannot be read, or is too short for a frame.
        """
        return _encode(file, self._encoders)

    def encode_stream(self, source: BinaryIO) -> Iterator[dict[str, list[NDArray[np.float16]]]]:
        """Encodes a WAV stream; yields encoder -> features of the windows that each further second completes.

        A thread reads the samples as they arrive, up to 120 s before they are encoded, because a microphone does not
        wait until a question is answered. The features equal those of `encode`, except in the last bits where the
        sample rate is not the encoder's.

        Raises:
            UserError: the source is not a WAV of 16-bit samples.
        """
        where = "standard input"
        try:
            stream = WavStream(source)
        except Reject as reject:
            fault = f"cannot be decoded ({reject.detail})"
            raise UserError(where, fault, "pipe a WAV into it: ffmpeg -i SOURCE -c:a pcm_s16le -f wav -") from None
        segments = read_ahead(stream.segments(), _READ_AHEAD_S)
        for windows in preprocess_segments(segments, stream.sample_rate_hz, self._encoders):
            yield _encode_windows(windows, self._encoders, where)


def read_ahead(items: Iterator[T], limit: int) -> Iterator[T]:
    """Yields the same items, which a thread reads as they arrive, up to `limit` before they are requested."""
    queue: Queue[tuple[T] | Exception | None] = Queue(limit)

    def fill_queue() -> None:
        try:
            for item in items:
                queue.put((item,))
            queue.put(None)
        except Exception as error:
            queue.put(error)

    Thread(target=fill_queue, daemon=True).start()  # a daemon: it may wait for a source that never ends
    while (entry := queue.get()) is not None:
        if isinstance(entry, Exception):
            raise entry
        yield entry[0]


def duration_s(file: Path) -> float:
    """Reads the duration of an audio file from its header.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with AudioFile(str(file), None) as audio:
            return audio.duration_s
    except Reject as reject:
        raise _unusable(file, reject) from None


def spectrogram(file: Path) -> NDArray[np.float32]:
    """Computes the log-mel spectrogram of an audio file: (frames of 10 ms, 64 mel bins up to SPECTROGRAM_HIGHEST_HZ).

    Raises:
        UserError: the file cannot be read.
    """
    config = LogMelConfig(frames_per_token=1)
    encoder = build_encoder(config, describe_encoder(config), "cpu")
    return _encode(file, {"log_mel": encoder}).features["log_mel"].astype(np.float32)


def _encode(file: Path, encoders: Mapping[str, Encoder]) -> EncodedAudio:
    windows: dict[str, list[NDArray[np.float16]]] = {name: [] for name in encoders}
    duration_s = 0.0
    try:
        for segment in preprocess_file(str(file), encoders):
            duration_s = segment.duration_s
            for name, features in _encode_windows(segment.windows, encoders, file).items():
                windows[name] += features
    except Reject as reject:
        raise _unusable(file, reject) from None
    for name, parts in windows.items():
        if not sum(map(len, parts)):
            raise UserError(file, f"is too short for a frame of encoder '{name}'", "give another audio file")
    return EncodedAudio({name: np.concatenate(parts) for name, parts in windows.items()}, duration_s)


def _encode_windows(
    prepared: Mapping[str, list[PreparedWindow]], encoders: Mapping[str, Encoder], where: object
) -> dict[str, list[NDArray[np.float16]]]:
    """Returns encoder -> features of each of its windows.

    Raises:
        UserError: a feature is outside the range of float16.
    """
    features = {
        name: [
            frames
            for window in windows
            for frames in encoders[name].encode_windows([window.prepared], [window.samples])
        ]
        for name, windows in prepared.items()
    }
    for name, windows in features.items():
        if not all(np.isfinite(window).all() for window in windows):
            raise UserError(where, f"gives features of encoder '{name}' beyond float16", "give another audio file")
    return features


def _unusable(where: object, reject: Reject) -> UserError:
    return UserError(where, f"is {reject.reason.replace('_', ' ')} ({reject.detail})", "give another audio file")
