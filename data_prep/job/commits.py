"""Which partitions are finished: one commit record each, and the index of a column merged from them alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_prep.job.store import Store
from pipeline.core.feature_contract import CLIPS
from pipeline.core.records import Strict

COMMITS = "commits"
INDEX = "index.json"
REJECTS = "rejects.jsonl"


class CommittedFile(Strict):
    name: str
    bytes: int
    xxh64: str


class CommittedColumn(Strict):
    """One partition of one column: its sub-folder of the column's folder, and the files in it.

    `device`: what the encoder ran on; features differ in their last digits between kinds.
    """

    folder: str
    device: str | None = None
    samples: int
    files: list[CommittedFile]


class RejectedClip(Strict):
    """A line of rejects.jsonl."""

    clip_id: str
    reason: str
    detail: str
    audio: str | None = None


class Commit(Strict):
    """A finished partition. The file that holds this record is the partition's one atomic act: no record, no partition.

    Attributes:
        audio_sha256, rows_sha256: of the partition's plan, as it was when this was written.
        generation: how often the partition has grown (new questions, new encoders) since it was first written.
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

    @property
    def bytes(self) -> int:
        return sum(file.bytes for column in self.columns.values() for file in column.files)


@dataclass(frozen=True)
class Progress:
    """How far a partition is: clips before `position` are done."""

    position: int
    rejected: int
    audio_s: float


def partition_folder(partition: int, generation: int) -> str:
    return f"part-{partition:05}-{generation}" if generation else f"part-{partition:05}"


def write_commit(store: Store, commit: Commit) -> None:
    store.write(_path(commit.partition), (commit.model_dump_json(indent=1) + "\n").encode())


def read_record(store: Store, name: str) -> Commit | None:
    """A commit record as it stands; None when there is none, or none that can be read."""
    try:
        return Commit.model_validate_json(store.read(name))
    except (FileNotFoundError, ValueError):
        return None


def read_commit(store: Store, partition: int) -> Commit | None:
    """The record of a partition; None when it is not committed or when files that it names are not there."""
    commit = read_record(store, _path(partition))
    if commit is None:
        return None
    for name, column in commit.columns.items():
        for file in column.files:
            if store.size(f"{name}/{column.folder}/{file.name}") != file.bytes:
                return None
    return commit


def remove_commit(store: Store, partition: int) -> None:
    store.remove(_path(partition))


def sweep(store: Store, columns: Iterable[str], commits: Iterable[Commit], keep_indexed: bool) -> None:
    """Removes every partition folder that no commit names: what an interrupted attempt left.

    Args:
        keep_indexed: spare those that a column's present index names, while a finished set grows.
    """
    kept = {f"{name}/{column.folder}" for commit in commits for name, column in commit.columns.items()}
    for column in columns:
        if keep_indexed and store.size(f"{column}/{INDEX}") is not None:
            shards = json.loads(store.read(f"{column}/{INDEX}"))["shards"]
            kept |= {f"{column}/{shard['raw_data']['basename'].split('/')[0]}" for shard in shards}
        for name in store.list(column):
            if name.startswith("part-") and f"{column}/{name}" not in kept:
                store.remove(f"{column}/{name}")


def merged_index(store: Store, column: str, commits: Sequence[Commit]) -> bytes:
    """The index of a whole column: the shards of the committed partitions, in their order.

    As `streaming.base.util.merge_index`, which however takes every index it finds and does not write atomically.
    """
    shards = []
    for commit in commits:
        folder = commit.columns[column].folder
        for shard in json.loads(store.read(f"{column}/{folder}/{INDEX}"))["shards"]:
            shard["raw_data"]["basename"] = f"{folder}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()


def column_names(encoders: Iterable[str]) -> list[str]:
    return [CLIPS, *encoders]


def _path(partition: int) -> str:
    return f"{COMMITS}/{partition:05}.json"
