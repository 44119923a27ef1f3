"""The work on one partition, in one process: decode ahead, encode in batches, write shards, commit. Knows no Ray."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from data_prep.audio.decode import Reject
from data_prep.config import PrepareConfig
from data_prep.encoders.base import Encoder, Features
from data_prep.encoders.build import build_encoder
from data_prep.encoders.inputs import PreparedWindow, Segment, decode
from data_prep.job.commits import (
    Commit,
    CommittedColumn,
    CommittedFile,
    Progress,
    RejectedClip,
    partition_folder,
    read_commit,
    write_commit,
)
from data_prep.job.mds_writer import MAX_SAMPLE_BYTES, MdsWriter, read_partition
from data_prep.job.partitions import PlannedPartition, read_partition_clips
from data_prep.job.store import open_store
from data_prep.manifests.manifest import Clip, audio_path, audio_roots
from pipeline.core.feature_contract import CLIP_COLUMNS, CLIPS, FEATURE_COLUMNS, EncoderContract

PROGRESS_S = 0.5


@dataclass
class _Work:
    """A clip on its way: its features so far, and how many of its windows wait for their batch."""

    position: int
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
        self._contracts = contracts
        self._store = open_store(config.output)
        self._roots = audio_roots(config)
        self._threads = max(1, int(config.workers.cpus))
        torch.set_num_threads(self._threads)
        self._on_gpu = config.workers.gpus > 0
        self._device = torch.cuda.get_device_name() if self._on_gpu else "cpu"

    def load_encoders(self) -> None:
        """Loads them now rather than with the first clip."""
        _ = self._encoders

    @functools.cached_property
    def _encoders(self) -> dict[str, Encoder]:
        device = "cuda" if self._on_gpu else "cpu"
        return {name: build_encoder(e, self._contracts[name], device) for name, e in self._config.encoders.items()}

    def extract(
        self, partition: int, planned: PlannedPartition, poison_clips: dict[int, str]
    ) -> Iterator[Progress | Commit]:
        """Does one partition; yields progress from time to time and its commit record in the end.

        Of a partition that is committed already only what it lacks is done: features of encoders that it does not have
        yet, and the questions of its clips when they have changed.

        Args:
            poison_clips: position in the partition -> why that clip is not tried any more.
        """
        clips = read_partition_clips(self._store, partition)
        old = read_commit(self._store, partition)
        if old is not None and old.audio_sha256 != planned.audio_sha256:
            old = None
        missing = [name for name in self._config.encoders if old is None or name not in old.columns]
        if old is not None and not missing and old.rows_sha256 == planned.rows_sha256:
            yield old  # committed by an attempt that died before it could say so
            return
        folder = partition_folder(partition, 0 if old is None else old.generation + 1)
        columns = {} if old is None else dict(old.columns)
        with self._store.scratch() as scratch, _Writers(scratch) as writers:
            durations_s: dict[str, float] = {}
            rejects: list[RejectedClip] = []
            if missing:
                before = set() if old is None else {reject.clip_id for reject in old.rejects}
                items = [(i, clip) for i, clip in enumerate(clips) if clip.clip_id not in before]
                yield from self._write_features(items, poison_clips, missing, writers, durations_s, rejects)
            elif not self._config.encoders:
                durations_s = {clip.clip_id: 0.0 for clip in clips}
            elif old is not None:
                with self._store.fetch(f"{CLIPS}/{old.columns[CLIPS].folder}") as path:
                    durations_s = {sample["clip_id"]: float(sample["duration_s"]) for sample in read_partition(path)}
            if old is None or rejects or old.rows_sha256 != planned.rows_sha256:
                for clip in clips:
                    if clip.clip_id in durations_s:
                        writers.write(CLIPS, CLIP_COLUMNS, _clip_sample(clip, durations_s[clip.clip_id]))
                writers.open(CLIPS, CLIP_COLUMNS)
            if old is not None and rejects:  # a clip that a new encoder rejects leaves the columns of the others, too
                self._copy_without({reject.clip_id for reject in rejects}, old, writers)
            for name, (writer, files) in writers.finish().items():
                self._store.publish(writer.folder, f"{name}/{folder}")
                device = None if name == CLIPS else columns[name].device if name in columns else self._device
                columns[name] = CommittedColumn(folder=folder, device=device, samples=writer.samples, files=files)
        order = {clip.clip_id: position for position, clip in enumerate(clips)}
        commit = Commit(
            partition=partition,
            generation=0 if old is None else old.generation + 1,
            audio_sha256=planned.audio_sha256,
            rows_sha256=planned.rows_sha256,
            clips=len(durations_s),
            questions=sum(len(clip.questions) for clip in clips if clip.clip_id in durations_s),
            audio_s=sum(durations_s.values()),
            columns=dict(sorted(columns.items())),
            rejects=sorted([*(old.rejects if old else []), *rejects], key=lambda reject: order[reject.clip_id]),
        )
        write_commit(self._store, commit)
        yield commit

    def probe(self, partition: int, position: int) -> None:
        """Takes one clip through everything but the writing, to see whether this process survives it."""
        clips = read_partition_clips(self._store, partition)
        for _ in self._encode([(position, clips[position])], {}, list(self._encoders)):
            pass

    def _write_features(
        self,
        items: list[tuple[int, Clip]],
        poison_clips: dict[int, str],
        encoders: list[str],
        writers: _Writers,
        durations_s: dict[str, float],
        rejects: list[RejectedClip],
    ) -> Iterator[Progress]:
        """Fills the columns of these encoders; tells the duration of each clip written, and the rejects."""
        last_report = time.monotonic()
        for name in encoders:
            writers.open(name, FEATURE_COLUMNS)
        for work in self._encode(items, poison_clips, encoders):
            reject = work.reject or _unstorable(work)
            if reject is not None:
                rejects.append(
                    RejectedClip(
                        clip_id=work.clip.clip_id, reason=reject.reason, detail=reject.detail, audio=work.clip.audio
                    )
                )
            else:
                for name, windows in work.features.items():
                    features = np.ascontiguousarray(windows[0] if len(windows) == 1 else np.concatenate(windows))
                    writers.write(name, FEATURE_COLUMNS, {"clip_id": work.clip.clip_id, "features": features})
                durations_s[work.clip.clip_id] = work.duration_s
            if time.monotonic() - last_report > PROGRESS_S:
                last_report = time.monotonic()
                yield Progress(work.position + 1, len(rejects), sum(durations_s.values()))

    def _copy_without(self, clip_ids: set[str], old: Commit, writers: _Writers) -> None:
        for name, column in old.columns.items():
            if name == CLIPS:
                continue
            writers.open(name, FEATURE_COLUMNS)
            with self._store.fetch(f"{name}/{column.folder}") as path:
                for sample in read_partition(path):
                    if sample["clip_id"] not in clip_ids:
                        writers.write(name, FEATURE_COLUMNS, sample)

    def _encode(
        self, items: list[tuple[int, Clip]], poison_clips: dict[int, str], encoders: list[str]
    ) -> Iterator[_Work]:
        """Yields every clip in order, with its features or its reject."""
        batches = {name: _Batch(name, self._encoders[name], self._config.batch_s) for name in encoders}
        queue: deque[_Work] = deque()
        with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for work, segments in self._decode_ahead(items, poison_clips, encoders, pool):
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
        self, items: list[tuple[int, Clip]], poison_clips: dict[int, str], encoders: list[str], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Work, Iterator[Segment]]]:
        """Clips in order, each with its segments; threads decode the first segment of the clips that come next."""
        ahead: deque[tuple[_Work, Iterator[Segment]]] = deque()
        for position, clip in items:
            if position in poison_clips:
                reject = Reject("killed_worker", poison_clips[position])
                ahead.append((_Work(position, clip, reject=reject), iter(())))
            else:
                ahead.append((_Work(position, clip), _one_ahead(self._decode(clip, encoders), pool)))
            if len(ahead) > 2 * self._threads + 2:
                yield ahead.popleft()
        yield from ahead

    def _decode(self, clip: Clip, names: list[str]) -> Iterator[Segment]:
        """Runs in the threads: decodes, resamples, cuts windows and prepares them."""
        encoders = {name: self._encoders[name] for name in names}
        return decode(audio_path(clip, self._roots), encoders, self._config.max_clip_s)


class _Writers:
    """The columns of one partition while they are written to scratch; abandoned unless finished."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._open: dict[str, MdsWriter] = {}

    def open(self, name: str, columns: dict[str, str]) -> MdsWriter:
        if name not in self._open:
            self._open[name] = MdsWriter(self._scratch / name, columns)
        return self._open[name]

    def write(self, name: str, columns: dict[str, str], sample: dict[str, Any]) -> None:
        self.open(name, columns).write(sample)

    def finish(self) -> dict[str, tuple[MdsWriter, list[CommittedFile]]]:
        finished = {name: (writer, writer.finish()) for name, writer in sorted(self._open.items())}
        self._open = {}
        return finished

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.abandon()


def _one_ahead(segments: Iterator[Segment], pool: ThreadPoolExecutor) -> Iterator[Segment]:
    """The same segments, the next one always being decoded by the pool; starts at once."""
    future = pool.submit(next, segments, None)

    def follow() -> Iterator[Segment]:
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
        self._windows: list[tuple[_Work, PreparedWindow]] = []
        self._longest = 0

    def add(self, work: _Work, window: PreparedWindow) -> None:
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


def _clip_sample(clip: Clip, duration_s: float) -> dict[str, Any]:
    return {
        "clip_id": clip.clip_id,
        "duration_s": duration_s,
        "dataset": clip.dataset,
        "domain": clip.domain,
        "questions": [question.model_dump(mode="json", exclude_none=True) for question in clip.questions],
    }
