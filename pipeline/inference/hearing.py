"""From an audio file to the features that a model understands: the one door from here to data_prep's encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.audio import AudioFile, Reject
from data_prep.config import LogMelConfig
from data_prep.decoding import decode
from data_prep.encoders.base import Encoder
from data_prep.encoders.build import build_encoder, config_of, describe_encoder
from pipeline.errors import UserError
from pipeline.features import EncoderContract

SPECTROGRAM_HZ = 100  # columns a second


@dataclass(frozen=True)
class Sound:
    """An audio file as a model hears it: encoder -> (frames, width) float16."""

    features: dict[str, NDArray[np.float16]]
    duration_s: float


class Ears:
    """The encoders that made the features which a model was trained on.

    Args:
        contracts: encoder -> how its features were made.
        weights: encoder -> folder, file or Hub name of its weights, where they moved.
        device: `cpu` or `cuda`.

    Raises:
        UserError: an encoder that cannot be had, or that would make other features.
    """

    def __init__(self, contracts: Mapping[str, EncoderContract], weights: Mapping[str, str], device: str) -> None:
        for name in weights:
            if name not in contracts:
                raise UserError("--encoder", f"the model has no encoder '{name}'", f"it has {', '.join(contracts)}")
        self._encoders: dict[str, Encoder] = {}
        for name, contract in contracts.items():
            config = config_of(contract, weights.get(name))
            found = describe_encoder(config)
            if found.fingerprint != contract.fingerprint:
                fault = f"makes features with fingerprint {found.fingerprint}, the model wants {contract.fingerprint}"
                raise UserError(f"encoder '{name}'", fault, "give the same weights with --encoder NAME=FOLDER")
            self._encoders[name] = build_encoder(config, found, device)

    def hear(self, file: Path) -> Sound:
        """Features of an audio file, as preparation makes them.

        Raises:
            UserError: the file cannot be read, or gives no features.
        """
        return _encode(file, self._encoders)


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
    """Log-mel spectrogram of an audio file, (columns, 64), SPECTROGRAM_HZ columns a second.

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
            for name, prepared in segment.windows.items():
                for window in prepared:
                    windows[name] += encoders[name].encode_windows([window.prepared], [window.samples])
    except Reject as reject:
        raise _unusable(file, reject) from None
    features = {name: np.concatenate(parts) for name, parts in windows.items()}
    for name, frames in features.items():
        if not len(frames) or not np.isfinite(frames).all():
            fault = "is too short for a frame" if not len(frames) else "gives values beyond float16"
            raise UserError(file, f"{fault} of encoder '{name}'", "give another audio file")
    return Sound(features, duration_s)


def _unusable(file: Path, reject: Reject) -> UserError:
    return UserError(file, f"is {reject.reason.replace('_', ' ')} ({reject.detail})", "give another audio file")
