"""The work on one partition, in one process: decode ahead, encode in batches, write shards, commit. Knows no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.audio import AudioFile, Reject
from data_prep.commits import Commit, CommittedColumn, Progress, RejectedClip, partition_name, write_commit
from data_prep.config import PrepareConfig
from data_prep.encoders.base import Encoder, Features, Windower
from data_prep.encoders.build import build_encoder
from data_prep.manifest import Clip, audio_path, audio_roots
from data_prep.plan import read_partition_clips
from data_prep.resample import Resampler
from data_prep.shards import MAX_SAMPLE_BYTES, ColumnWriter
from data_prep.storage import open_store
from pipeline.features import CLIP_COLUMNS, CLIPS, FEATURE_COLUMNS, EncoderContract

PROGRESS_S = 0.5


@dataclass
class _Work:
    """A clip on its way: its features so far, and how many of its windows wait for their batch."""

    clip: Clip
    duration_s: float = 0.0
    features: dict[str, list[Features]] = field(default_factory=dict)
    waiting: int = 0
    decoded: bool = False
    reject: Reject | None = None

    @property
    def done(self) -> bool:
        return self.reject is not None or (self.decoded and not self.waiting)


class PartitionWorker:
    """Owns the loaded encoders of one process.

    What it writes depends on the plan and the settings alone: clips are taken in order, and the batches are cut by
    their durations, so that every attempt gives the same bytes.
    """

    def __init__(self, config: PrepareConfig, contracts: dict[str, EncoderContract]) -> None:
        self._config = config
        self._store = open_store(config.output)
        self._roots = audio_roots(config)
        self._threads = max(1, int(config.workers.cpus))
        torch.set_num_threads(self._threads)
        on_gpu = config.workers.gpus > 0
        self.device = torch.cuda.get_device_name() if on_gpu else "cpu"
        self._encoders = {
            name: build_encoder(encoder, contracts[name], "cuda" if on_gpu else "cpu")
            for name, encoder in config.encoders.items()
        }
        self._rates_hz = sorted({encoder.contract.sample_rate_hz for encoder in self._encoders.values()})

    def extract(self, partition: int, plan_sha256: str, killers: dict[int, str]) -> Iterator[Progress | Commit]:
        """Does one partition; yields progress from time to time and its commit record in the end.

        Args:
            plan_sha256: of the partition, for its commit record.
            killers: clips (by position in the partition) that must not be touched any more, with the reason's detail.
        """
        clips = read_partition_clips(self._store, partition)
        rejects: list[RejectedClip] = []
        questions, audio_s, position, last_report = 0, 0.0, 0, time.monotonic()
        with self._store.scratch() as scratch:
            writers = {name: ColumnWriter(scratch / name, FEATURE_COLUMNS) for name in self._encoders}
            writers[CLIPS] = ColumnWriter(scratch / CLIPS, CLIP_COLUMNS)
            try:
                for work in self._encode(clips, killers):
                    position += 1
                    reject = work.reject or _unstorable(work)
                    if reject is not None:
                        rejects.append(_rejected(work.clip, reject))
                    else:
                        _write(writers, work)
                        questions += len(work.clip.questions)
                        audio_s += work.duration_s
                    if time.monotonic() - last_report > PROGRESS_S:
                        last_report = time.monotonic()
                        yield Progress(position, len(rejects), audio_s)
                columns = {name: self._publish(writer, name, partition) for name, writer in sorted(writers.items())}
            except BaseException:
                for writer in writers.values():
                    writer.abandon()
                raise
        commit = Commit(
            partition=partition,
            plan_sha256=plan_sha256,
            clips=len(clips) - len(rejects),
            questions=questions,
            audio_s=audio_s,
            device=self.device,
            columns=columns,
            rejects=rejects,
        )
        write_commit(self._store, commit)
        yield commit

    def probe(self, partition: int, position: int) -> None:
        """Takes one clip through everything but the writing, to see whether this process survives it."""
        clips = read_partition_clips(self._store, partition)
        for _ in self._encode([clips[position]], {}):
            pass

    def _publish(self, writer: ColumnWriter, column: str, partition: int) -> CommittedColumn:
        files = writer.finish()
        folder = partition_name(partition)
        self._store.publish(Path(writer.folder), f"{column}/{folder}")
        return CommittedColumn(folder=folder, samples=writer.samples, files=files)

    def _encode(self, clips: list[Clip], killers: dict[int, str]) -> Iterator[_Work]:
        """Yields every clip in order, with its features or its reject."""
        batches = {name: _Batch(name, encoder, self._config.batch_s) for name, encoder in self._encoders.items()}
        queue: deque[_Work] = deque()
        with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for work, segments in self._decode_ahead(clips, killers, pool):
                queue.append(work)
                try:
                    for segment in segments:
                        work.duration_s = segment.duration_s
                        for name, windows in segment.windows.items():
                            for window in windows:
                                batches[name].add(work, window)
                    work.decoded = True
                except Reject as reject:
                    work.reject = reject
                while queue and queue[0].done:
                    yield queue.popleft()
        for batch in batches.values():
            batch.flush()
        yield from queue

    def _decode_ahead(
        self, clips: list[Clip], killers: dict[int, str], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Work, Iterator[_Segment]]]:
        """Clips in order, each with its segments; threads decode the first segment of the clips that come next."""
        ahead: deque[tuple[_Work, Iterator[_Segment]]] = deque()
        for position, clip in enumerate(clips):
            if position in killers:
                ahead.append((_Work(clip, reject=Reject("killed_worker", killers[position])), iter(())))
            else:
                ahead.append((_Work(clip), _one_ahead(self._decode(clip), pool)))
            if len(ahead) > 2 * self._threads + 2:
                yield ahead.popleft()
        yield from ahead

    def _decode(self, clip: Clip) -> Iterator[_Segment]:
        """Runs in the threads: decodes, resamples, cuts windows and prepares them."""
        with AudioFile(audio_path(clip, self._roots), self._config.max_clip_s) as file:
            resamplers = {rate_hz: Resampler(file.sample_rate_hz, rate_hz) for rate_hz in self._rates_hz}
            windowers = {name: Windower(encoder) for name, encoder in self._encoders.items()}
            for samples, last in file.segments():
                audio = {rate_hz: resampler.push(samples, last) for rate_hz, resampler in resamplers.items()}
                windows = {
                    name: [
                        _Window(encoder.prepare(window), window.samples)
                        for window in windowers[name].push(audio[encoder.contract.sample_rate_hz], last)
                    ]
                    for name, encoder in self._encoders.items()
                }
                yield _Segment(windows, file.duration_s)


@dataclass(frozen=True)
class _Window:
    prepared: Tensor
    samples: int


@dataclass(frozen=True)
class _Segment:
    windows: dict[str, list[_Window]]
    duration_s: float


def _one_ahead(segments: Iterator[_Segment], pool: ThreadPoolExecutor) -> Iterator[_Segment]:
    """The same segments, the next one always being decoded by the pool; starts at once."""
    future = pool.submit(next, segments, None)

    def follow() -> Iterator[_Segment]:
        nonlocal future
        while (segment := future.result()) is not None:
            future = pool.submit(next, segments, None)
            yield segment

    return follow()


class _Batch:
    """Windows of one encoder that go through it together: at most `batch_s` seconds, padding counted."""

    def __init__(self, name: str, encoder: Encoder, batch_s: float) -> None:
        self._name = name
        self._encoder = encoder
        self._limit = batch_s * encoder.contract.sample_rate_hz
        self._windows: list[tuple[_Work, _Window]] = []
        self._longest = 0

    def add(self, work: _Work, window: _Window) -> None:
        length = self._encoder.window_samples if self._encoder.pad_to_window else window.samples
        if self._windows and max(self._longest, length) * (len(self._windows) + 1) > self._limit:
            self.flush()
        self._windows.append((work, window))
        self._longest = max(self._longest, length)
        work.waiting += 1

    def flush(self) -> None:
        if not self._windows:
            return
        features = self._encoder.encode_windows(
            [window.prepared for _, window in self._windows], [window.samples for _, window in self._windows]
        )
        for (work, _), frames in zip(self._windows, features, strict=True):
            work.waiting -= 1
            if work.reject is None:
                work.features.setdefault(self._name, []).append(frames)
        self._windows, self._longest = [], 0


def _unstorable(work: _Work) -> Reject | None:
    for name, windows in work.features.items():
        if not sum(len(features) for features in windows):
            return Reject("too_short", f"no frame of {name}")
        if sum(features.nbytes for features in windows) > MAX_SAMPLE_BYTES:
            return Reject("too_large", f"features of {name} exceed {MAX_SAMPLE_BYTES} bytes")
        if not all(np.isfinite(features).all() for features in windows):
            return Reject("not_finite", f"features of {name} do not fit in float16")
    return None


def _write(writers: dict[str, ColumnWriter], work: _Work) -> None:
    clip = work.clip
    for name, windows in work.features.items():
        features = windows[0] if len(windows) == 1 else np.concatenate(windows)
        writers[name].write({"clip_id": clip.clip_id, "features": np.ascontiguousarray(features)})
    writers[CLIPS].write(
        {
            "clip_id": clip.clip_id,
            "duration_s": work.duration_s,
            "dataset": clip.dataset,
            "domain": clip.domain,
            "questions": [question.model_dump(mode="json", exclude_none=True) for question in clip.questions],
        }
    )


def _rejected(clip: Clip, reject: Reject) -> RejectedClip:
    return RejectedClip(clip_id=clip.clip_id, reason=reject.reason, detail=reject.detail, audio=clip.audio)
