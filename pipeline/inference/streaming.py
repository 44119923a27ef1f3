"""Audio that still arrives, heard window by window. Owns when to ask; what is kept of it, `StreamingAudio` knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import torch

from pipeline.core.errors import UserError
from pipeline.inference.encode_audio import AudioEncoders
from pipeline.inference.responder import Responder
from pipeline.model import StreamingAudio


def keep_newest(responder: Responder, audio_encoders: AudioEncoders, keep_s: float) -> StreamingAudio:
    """Nothing yet of a clip of which the newest `keep_s` seconds will be kept.

    Raises:
        UserError: a model that cannot hear bit by bit.
    """
    return StreamingAudio(
        responder.model, {name: int(keep_s * rate_hz) for name, rate_hz in audio_encoders.frame_rates_hz.items()}
    )


def listen(live: StreamingAudio, audio_encoders: AudioEncoders, source: BinaryIO, every_s: float) -> Iterator[float]:
    """Fills `live` from a WAV that arrives, and stops to be asked: every `every_s` seconds, and at the end.

    Audio counts as heard when its window is complete: 30 s of most encoders.

    Yields:
        how many seconds have been heard since the beginning.

    Raises:
        UserError: no WAV, or one without a frame.
    """
    like = live.language_model
    frames = dict.fromkeys(audio_encoders.frame_rates_hz, 0)
    heard_s = asked_s = 0.0
    for windows in audio_encoders.encode_stream(source):
        for name, parts in windows.items():
            for features in parts:
                frames[name] += len(features)
                live.push(name, torch.from_numpy(features).to(like.device, like.dtype))
        heard_s = min(frames[name] / rate_hz for name, rate_hz in audio_encoders.frame_rates_hz.items())
        if heard_s >= (asked_s // every_s + 1) * every_s:
            asked_s = heard_s
            yield heard_s
    if not heard_s:
        raise UserError("standard input", "ends before the first frame of audio", "pipe a longer recording into it")
    if heard_s > asked_s:
        yield heard_s
