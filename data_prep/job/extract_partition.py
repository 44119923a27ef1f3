"""Processes one partition in one process: encodes its clips, writes their shards and commits them. Imports no Ray."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from data_prep.config import PrepareConfig
from data_prep.encoders.base import Encoder
from data_prep.encoders.build import build_encoder
from data_prep.job.commits import (
    ClipWarning,
    Commit,
    CommittedColumn,
    PartitionProgress,
    RejectedClip,
    partition_folder,
    read_commit,
    write_commit,
)
from data_prep.job.encode_clips import ClipEncoder, ClipState
from data_prep.job.mds_writer import ColumnWriters, read_partition
from data_prep.job.partitions import PlannedPartition, read_partition_clips
from data_prep.job.store import open_store
from data_prep.manifests.clips import Clip, absolute_location
from data_prep.manifests.reader import audio_path, audio_roots
from pipeline.core.feature_contract import CLIP_COLUMNS, CLIPS, FEATURE_COLUMNS, EncoderContract

PROGRESS_S = 0.5


@dataclass
class _Outcome:
    """The clips of a partition: duration of each clip that is written, by id, the rejected ones, and the warnings."""

    durations_s: dict[str, float] = field(default_factory=dict)
    rejects: list[RejectedClip] = field(default_factory=list)
    warnings: list[ClipWarning] = field(default_factory=list)


class PartitionWorker:
    """Holds the loaded encoders of one process and processes partitions with them.

    The shards depend on the plan and the settings alone, so that every attempt writes the same bytes.
    """

    def __init__(self, config: PrepareConfig, contracts: dict[str, EncoderContract]) -> None:
        self._config = config
        self._contracts = contracts
        self._store = open_store(config.output)
        self._roots = audio_roots(config)
        torch.set_num_threads(max(1, int(config.workers.cpus)))
        self._on_gpu = config.workers.gpus > 0
        self._device = torch.cuda.get_device_name() if self._on_gpu else "cpu"

    def load_encoders(self) -> None:
        """Loads the encoders now rather than with the first clip."""
        _ = self._encoders

    @functools.cached_property
    def _encoders(self) -> dict[str, Encoder]:
        device = "cuda" if self._on_gpu else "cpu"
        return {name: build_encoder(e, self._contracts[name], device) for name, e in self._config.encoders.items()}

    def extract(
        self, partition: int, planned: PlannedPartition, poison_clips: dict[int, str]
    ) -> Iterator[PartitionProgress | Commit]:
        """Processes one partition; yields progress from time to time and its commit record at the end.

        Of a committed partition only what it lacks is done: features of encoders that were added, and the questions of
        its clips when they have changed.

        Args:
            partition: index of the partition.
            planned: the partition in the plan.
            poison_clips: position in the partition -> why that clip is rejected without another attempt.
        """
        clips = read_partition_clips(self._store, partition)
        old = read_commit(self._store, partition)
        if old is not None and old.audio_sha256 != planned.audio_sha256:
            old = None
        missing = [name for name in self._config.encoders if old is None or name not in old.columns]
        if old is not None and not missing and old.rows_sha256 == planned.rows_sha256:
            yield old  # committed by an attempt that died before it could report it
            return
        generation = 0 if old is None else old.generation + 1
        folder = partition_folder(partition, generation)
        columns = {} if old is None else dict(old.columns)
        with self._store.scratch() as scratch, ColumnWriters(scratch) as writers:
            outcome = _Outcome()
            if missing:
                excluded = set() if old is None else {reject.clip_id for reject in old.rejects}
                items = [(i, clip) for i, clip in enumerate(clips) if clip.clip_id not in excluded]
                yield from self._write_features(items, poison_clips, missing, writers, outcome)
            elif not self._config.encoders:
                outcome.durations_s = {clip.clip_id: 0.0 for clip in clips}
            elif old is not None:
                outcome.durations_s = self._read_durations(old)
            if old is None or outcome.rejects or old.rows_sha256 != planned.rows_sha256:
                for clip in clips:
                    if clip.clip_id in outcome.durations_s:
                        writers.write(CLIPS, CLIP_COLUMNS, self._clip_sample(clip, outcome.durations_s[clip.clip_id]))
                writers.open(CLIPS, CLIP_COLUMNS)
            if old is not None and outcome.rejects:  # a clip that a new encoder rejects is removed from all columns
                self._copy_without({reject.clip_id for reject in outcome.rejects}, old, writers)
            for name, (writer, files) in writers.finish().items():
                self._store.publish(writer.folder, f"{name}/{folder}")
                device = None if name == CLIPS else columns[name].device if name in columns else self._device
                columns[name] = CommittedColumn(folder=folder, device=device, samples=writer.samples, files=files)
        order = {clip.clip_id: position for position, clip in enumerate(clips)}
        rejects = [*(old.rejects if old else []), *outcome.rejects]
        commit = Commit(
            partition=partition,
            generation=generation,
            audio_sha256=planned.audio_sha256,
            rows_sha256=planned.rows_sha256,
            clips=len(outcome.durations_s),
            questions=sum(len(clip.questions) for clip in clips if clip.clip_id in outcome.durations_s),
            audio_s=sum(outcome.durations_s.values()),
            columns=dict(sorted(columns.items())),
            rejects=sorted(rejects, key=lambda reject: order[reject.clip_id]),
            warnings=outcome.warnings if missing else old.warnings if old else [],
        )
        write_commit(self._store, commit)
        yield commit

    def probe(self, partition: int, position: int) -> None:
        """Encodes one clip without writing it, to find out whether this process survives that."""
        clips = read_partition_clips(self._store, partition)
        for _ in ClipEncoder(self._config, self._encoders).encode([(position, clips[position])], {}):
            pass

    def _write_features(
        self,
        items: list[tuple[int, Clip]],
        poison_clips: dict[int, str],
        encoders: list[str],
        writers: ColumnWriters,
        outcome: _Outcome,
    ) -> Iterator[PartitionProgress]:
        """Writes the columns of these encoders and fills `outcome`."""
        last_report = time.monotonic()
        for name in encoders:
            writers.open(name, FEATURE_COLUMNS)
        clip_encoder = ClipEncoder(self._config, {name: self._encoders[name] for name in encoders})
        for state in clip_encoder.encode(items, poison_clips):
            reject = state.find_reject()
            if reject is not None:
                outcome.rejects.append(_rejected_clip(state, reject.reason, reject.detail))
            else:
                for name in state.windows:
                    sample = {"clip_id": state.clip.clip_id, "features": state.features(name)}
                    writers.write(name, FEATURE_COLUMNS, sample)
                outcome.durations_s[state.clip.clip_id] = state.duration_s
                outcome.warnings += [
                    ClipWarning(clip_id=state.clip.clip_id, warning=warning, detail=detail)
                    for warning, detail in state.notes.items()
                ]
            if time.monotonic() - last_report > PROGRESS_S:
                last_report = time.monotonic()
                yield PartitionProgress(state.position + 1, len(outcome.rejects), sum(outcome.durations_s.values()))

    def _read_durations(self, commit: Commit) -> dict[str, float]:
        with self._store.fetch(f"{CLIPS}/{commit.columns[CLIPS].folder}") as path:
            return {sample["clip_id"]: float(sample["duration_s"]) for sample in read_partition(path)}

    def _copy_without(self, clip_ids: set[str], commit: Commit, writers: ColumnWriters) -> None:
        """Copies the committed feature columns without these clips."""
        for name, column in commit.columns.items():
            if name == CLIPS:
                continue
            writers.open(name, FEATURE_COLUMNS)
            with self._store.fetch(f"{name}/{column.folder}") as path:
                for sample in read_partition(path):
                    if sample["clip_id"] not in clip_ids:
                        writers.write(name, FEATURE_COLUMNS, sample)

    def _clip_sample(self, clip: Clip, duration_s: float) -> dict[str, Any]:
        return {
            "clip_id": clip.clip_id,
            "duration_s": duration_s,
            "dataset": clip.dataset,
            "domain": clip.domain,
            "questions": [question.model_dump(mode="json", exclude_none=True) for question in clip.questions],
            "audio": "" if clip.audio is None else absolute_location(audio_path(clip, self._roots)),
        }


def _rejected_clip(state: ClipState, reason: str, detail: str) -> RejectedClip:
    return RejectedClip(clip_id=state.clip.clip_id, reason=reason, detail=detail, audio=state.clip.address)
