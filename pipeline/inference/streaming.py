"""Encodes audio that arrives as a stream, window by window, and schedules the questions about it.

`StreamingAudio` limits how much of the audio is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import torch

from pipeline.core.errors import UserError
from pipeline.inference.encode_audio import AudioEncoders
from pipeline.inference.responder import Responder
from pipeline.model import StreamingAudio


def create_streaming_audio(responder: Responder, audio_encoders: AudioEncoders, keep_s: float) -> StreamingAudio:
    """Returns an empty stream that keeps the newest `keep_s` seconds of audio.

    Raises:
        UserError: the model cannot encode audio incrementally.
    """
    max_tokens = {name: int(keep_s * rate_hz) for name, rate_hz in audio_encoders.frame_rates_hz.items()}
    return StreamingAudio(responder.model, max_tokens)


def receive_audio(
    audio: StreamingAudio, audio_encoders: AudioEncoders, source: BinaryIO, every_s: float
) -> Iterator[float]:
    """Adds a WAV to a stream while it arrives, and pauses for questions: every `every_s` seconds, and at the end.

    Audio counts as received when its encoder window is complete: 30 s for most encoders.

    Yields:
        seconds of audio received since the beginning.

    Raises:
        UserError: the source is not a WAV, or ends before the first frame.
    """
    model = audio.language_model
    frame_counts = dict.fromkeys(audio_encoders.frame_rates_hz, 0)
    received_s = yielded_s = 0.0
    for windows in audio_encoders.encode_stream(source):
        for name, window_features in windows.items():
            for features in window_features:
                frame_counts[name] += len(features)
                audio.push(name, torch.from_numpy(features).to(model.device, model.dtype))
        received_s = min(frame_counts[name] / rate_hz for name, rate_hz in audio_encoders.frame_rates_hz.items())
        if received_s >= (yielded_s // every_s + 1) * every_s:
            yielded_s = received_s
            yield received_s
    if not received_s:
        raise UserError("standard input", "ends before the first frame of audio", "pipe a longer recording into it")
    if received_s > yielded_s:
        yield received_s
