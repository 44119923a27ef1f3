"""Encodes the clips of a partition in order: threads decode ahead, and windows of several clips share a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from data_prep.audio.decode import Reject
from data_prep.config import PrepareConfig
from data_prep.encoders.base import Encoder, Features
from data_prep.encoders.preprocessing import PreparedWindow, Segment, preprocess_file
from data_prep.job.mds_writer import MAX_SAMPLE_BYTES
from data_prep.manifests.clips import Clip
from data_prep.manifests.reader import audio_path, audio_roots


@dataclass
class ClipState:
    """A clip while it is encoded.

    Attributes:
        position: position of the clip in its partition.
        windows: features of the windows encoded so far, by encoder.
        pending_windows: number of windows that are in an unfinished batch.
        decoded: whether all of its windows were added to batches.
        notes: what the user should know about its audio; see `AudioFile`.
        reject: why the clip cannot be encoded, if so.
    """

    position: int
    clip: Clip
    duration_s: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)
    windows: dict[str, list[Features]] = field(default_factory=dict)
    pending_windows: int = 0
    decoded: bool = False
    reject: Reject | None = None

    @property
    def done(self) -> bool:
        """Whether the clip has all its features, or is rejected."""
        return self.reject is not None or (self.decoded and not self.pending_windows)

    def features(self, encoder: str) -> Features:
        """Returns the features (frames, width) of the whole clip."""
        windows = self.windows[encoder]
        return np.ascontiguousarray(windows[0] if len(windows) == 1 else np.concatenate(windows))

    def find_reject(self) -> Reject | None:
        """Returns why the clip cannot be stored, or None."""
        if self.reject is not None:
            return self.reject
        for encoder, windows in self.windows.items():
            if not sum(len(features) for features in windows):
                return Reject("too_short", f"no frame of {encoder}")
            if sum(features.nbytes for features in windows) > MAX_SAMPLE_BYTES:
                return Reject("too_large", f"features of {encoder} exceed {MAX_SAMPLE_BYTES} bytes")
            if not all(np.isfinite(features).all() for features in windows):
                return Reject("not_finite", f"features of {encoder} do not fit in float16")
        return None


class ClipEncoder:
    """Encodes clips with some of the loaded encoders.

    Batches are formed in the order of the clips by their durations alone, so that every attempt computes the same
    features.
    """

    def __init__(self, config: PrepareConfig, encoders: Mapping[str, Encoder]) -> None:
        self._encoders = encoders
        self._roots = audio_roots(config)
        self._batch_s, self._max_clip_s = config.batch_s, config.max_clip_s
        self._threads = max(1, int(config.workers.cpus))

    def encode(self, items: list[tuple[int, Clip]], poison_clips: Mapping[int, str]) -> Iterator[ClipState]:
        """Yields every clip in order, with its features or its reject.

        Args:
            items: clips with their positions in the partition.
            poison_clips: position -> why that clip is rejected without another attempt.
        """
        batches = {name: _Batch(name, encoder, self._batch_s) for name, encoder in self._encoders.items()}
        queue: deque[ClipState] = deque()
        with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for state, segments in self._decode_ahead(items, poison_clips, pool):
                queue.append(state)
                try:
                    for segment in segments:
                        state.duration_s, state.notes = segment.duration_s, segment.notes
                        for name, windows in segment.windows.items():
                            for window in windows:
                                batches[name].add(state, window)
                    state.decoded = True
                except Reject as reject:
                    state.reject = reject
                while queue and queue[0].done:
                    yield queue.popleft()
        for batch in batches.values():
            batch.flush()
        yield from queue

    def _decode_ahead(
        self, items: list[tuple[int, Clip]], poison_clips: Mapping[int, str], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[ClipState, Iterator[Segment]]]:
        """Yields clips in order, each with its segments; threads decode the first segments of the next clips."""
        ahead: deque[tuple[ClipState, Iterator[Segment]]] = deque()
        for position, clip in items:
            if position in poison_clips:
                reject = Reject("killed_worker", poison_clips[position])
                ahead.append((ClipState(position, clip, reject=reject), iter(())))
            else:
                ahead.append((ClipState(position, clip), _prefetch(self._decode(clip), pool)))
            if len(ahead) > 2 * self._threads + 2:
                yield ahead.popleft()
        yield from ahead

    def _decode(self, clip: Clip) -> Iterator[Segment]:
        """Runs in the threads: decodes, resamples, cuts into windows and prepares them."""
        return preprocess_file(audio_path(clip, self._roots), self._encoders, self._max_clip_s)


class _Batch:
    """Windows that go through one encoder together: at most `batch_s` seconds, padding included."""

    def __init__(self, name: str, encoder: Encoder, batch_s: float) -> None:
        self._name = name
        self._encoder = encoder
        self._limit = batch_s * encoder.contract.sample_rate_hz
        self._windows: list[tuple[ClipState, PreparedWindow]] = []
        self._longest = 0

    def add(self, state: ClipState, window: PreparedWindow) -> None:
        """Adds a window; encodes the batch first if it would become too large."""
        length = self._encoder.window_samples if self._encoder.pad_to_window else window.samples
        if self._windows and max(self._longest, length) * (len(self._windows) + 1) > self._limit:
            self.flush()
        self._windows.append((state, window))
        self._longest = max(self._longest, length)
        state.pending_windows += 1

    def flush(self) -> None:
        """Encodes the batch and hands the features to its clips."""
        if not self._windows:
            return
        features = self._encoder.encode_windows(
            [window.prepared for _, window in self._windows], [window.samples for _, window in self._windows]
        )
        for (state, _), frames in zip(self._windows, features, strict=True):
            state.pending_windows -= 1
            if state.reject is None:
                state.windows.setdefault(self._name, []).append(frames)
        self._windows, self._longest = [], 0


def _prefetch(segments: Iterator[Segment], pool: ThreadPoolExecutor) -> Iterator[Segment]:
    """Returns the same segments, while the pool always decodes the next one; starts at once."""
    future = pool.submit(next, segments, None)

    def follow() -> Iterator[Segment]:
        nonlocal future
        while (segment := future.result()) is not None:
            future = pool.submit(next, segments, None)
            yield segment

    return follow()
