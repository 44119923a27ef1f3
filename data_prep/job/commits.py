"""Records which partitions are finished, one commit record each, and merges the index of a column from the records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from data_prep.job.store import Store
from pipeline.core.feature_contract import CLIPS
from pipeline.core.records import Strict

COMMITS = "commits"
INDEX = "index.json"
REJECTS = "rejects.jsonl"
WARNINGS = "warnings.jsonl"


class CommittedFile(Strict):
    """Name, size and hash of a file of a committed partition."""

    name: str
    bytes: int
    xxh64: str


class CommittedColumn(Strict):
    """One partition of one column.

    Attributes:
        folder: sub-folder of the column's folder.
        device: kind of device that the encoder ran on; features differ in their last digits between kinds.
        samples: number of samples in the shards.
        files: all files in the folder.
    """

    folder: str
    device: str | None = None
    samples: int
    files: list[CommittedFile]


class RejectedClip(Strict):
    """A line of rejects.jsonl: a clip, or a conversation about a clip of the set.

    Attributes:
        clip_id: id of the clip; location of the row where it has no clip.
        question_id: id of the conversation that is rejected; None, which is not stored, means the clip itself.
    """

    clip_id: str
    question_id: str | None = None
    reason: str
    detail: str
    audio: str | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if value is not None or key != "question_id"}


class ClipWarning(Strict):
    """A line of warnings.jsonl: a clip that is in the set although something is wrong with its audio."""

    clip_id: str
    warning: str
    detail: str


class Commit(Strict):
    """A finished partition. Writing this record is the atomic commit: without it the partition does not exist.

    Attributes:
        audio_sha256, rows_sha256: hashes of the planned partition at the time of the commit.
        generation: number of times that the partition has grown (new questions, new encoders) since its first commit.
    """

    partition: int
    generation: int = 0
    audio_sha256: str
    rows_sha256: str
    clips: int
    questions: int
    audio_s: float
    columns: dict[str, CommittedColumn]
    rejects: list[RejectedClip]
    warnings: list[ClipWarning] = []

    @property
    def bytes(self) -> int:
        """Size of all files of the partition."""
        return sum(file.bytes for column in self.columns.values() for file in column.files)


@dataclass(frozen=True)
class PartitionProgress:
    """Progress in one partition: clips before `position` are done; `rejected` of them and `audio_s` so far."""

    position: int
    rejected: int
    audio_s: float


def partition_folder(partition: int, generation: int) -> str:
    """Returns the name of a partition's folder within a column."""
    return f"part-{partition:05}-{generation}" if generation else f"part-{partition:05}"


def write_commit(store: Store, commit: Commit) -> None:
    """Commits a partition; its files must be in place."""
    store.write(_path(commit.partition), (commit.model_dump_json(indent=1) + "\n").encode())


def read_record(store: Store, name: str) -> Commit | None:
    """Reads a commit record; None when it is missing or invalid."""
    try:
        return Commit.model_validate_json(store.read(name))
    except (FileNotFoundError, ValueError):
        return None


def read_commit(store: Store, partition: int) -> Commit | None:
    """Reads the record of a partition; None when it is not committed or when files of it are missing."""
    commit = read_record(store, _path(partition))
    if commit is None:
        return None
    for name, column in commit.columns.items():
        for file in column.files:
            if store.size(f"{name}/{column.folder}/{file.name}") != file.bytes:
                return None
    return commit


def remove_commit(store: Store, partition: int) -> None:
    """Revokes the commit of a partition."""
    store.remove(_path(partition))


def remove_uncommitted(store: Store, columns: Iterable[str], commits: Iterable[Commit], *, keep_indexed: bool) -> None:
    """Removes every partition folder that no commit refers to, which interrupted attempts leave.

    Args:
        keep_indexed: keep folders that a column's current index refers to, for readers of a set that grows.
    """
    referenced = {f"{name}/{column.folder}" for commit in commits for name, column in commit.columns.items()}
    for column in columns:
        if keep_indexed and store.size(f"{column}/{INDEX}") is not None:
            shards = json.loads(store.read(f"{column}/{INDEX}"))["shards"]
            referenced |= {f"{column}/{shard['raw_data']['basename'].split('/')[0]}" for shard in shards}
        for name in store.list(column):
            if name.startswith("part-") and f"{column}/{name}" not in referenced:
                store.remove(f"{column}/{name}")


def merged_index(store: Store, column: str, commits: Sequence[Commit]) -> bytes:
    """Returns the index of a whole column: the shards of the committed partitions in order.

    Equivalent to `streaming.base.util.merge_index`, which however merges every index in the folder and does not write
    atomically.
    """
    shards = []
    for commit in commits:
        folder = commit.columns[column].folder
        for shard in json.loads(store.read(f"{column}/{folder}/{INDEX}"))["shards"]:
            shard["raw_data"]["basename"] = f"{folder}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()


def column_names(encoders: Iterable[str]) -> list[str]:
    """Returns the columns of a feature set."""
    return [CLIPS, *encoders]


def _path(partition: int) -> str:
    return f"{COMMITS}/{partition:05}.json"
