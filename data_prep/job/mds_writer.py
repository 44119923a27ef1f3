"""Writes one partition of a column as MDS shards of mosaicml-streaming, and reads it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash
from streaming import MDSWriter
from streaming.base.format import reader_from_json

from data_prep.job.commits import INDEX, CommittedFile

SHARD_BYTES = 1 << 27  # a clip's features reach megabytes; the library's 64 MiB would hold few clips
MAX_SAMPLE_BYTES = (1 << 32) - SHARD_BYTES  # offsets inside a shard are 32-bit


class MdsWriter:
    """Writes one partition of one column; the files are complete only after `finish`.

    Not a context manager: MDSWriter's own one also finishes when the block raised, and a truncated partition would get
    a valid index. Shards are not compressed: it saves little on features and would slow down reading a lot.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str]) -> None:
        self.folder = folder
        self.samples = 0
        self._writer = _Writer(columns=dict(columns), out=str(folder), hashes=["xxh64"], size_limit=SHARD_BYTES)

    def write(self, sample: dict[str, Any]) -> None:
        """Appends a sample."""
        self._writer.write(sample)
        self.samples += 1

    def finish(self) -> list[CommittedFile]:
        """Writes the last shard and the index; returns the files with their sizes and hashes, sorted by name."""
        self._writer.finish()
        return [hash_file(path) for path in sorted(self.folder.iterdir())]

    def abandon(self) -> None:
        """Stops writing without an index."""
        self._writer.cancel_future_jobs()


class _Writer(MDSWriter):
    """MDSWriter without empty shards."""

    def flush_shard(self) -> None:
        if self.new_samples:  # a first sample above the size limit would leave an empty shard before it
            super().flush_shard()


class ColumnWriters:
    """The writers of the columns of one partition in a scratch folder; abandons them at exit unless finished."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._open: dict[str, MdsWriter] = {}

    def open(self, name: str, columns: dict[str, str]) -> MdsWriter:
        """Returns the writer of a column, which is opened if necessary."""
        if name not in self._open:
            self._open[name] = MdsWriter(self._scratch / name, columns)
        return self._open[name]

    def write(self, name: str, columns: dict[str, str], sample: dict[str, Any]) -> None:
        """Appends a sample to a column, which is opened if necessary."""
        self.open(name, columns).write(sample)

    def finish(self) -> dict[str, tuple[MdsWriter, list[CommittedFile]]]:
        """Finishes all columns; returns each writer with its files, by column."""
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


def hash_file(path: Path) -> CommittedFile:
    """Returns name, size and hash of a file."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return CommittedFile(name=path.name, bytes=path.stat().st_size, xxh64=digest.hexdigest())


def read_partition(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the samples of one partition of one column in order; arrays are read-only views."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for entry in index["shards"]:
        shard = reader_from_json(str(folder.parent), folder.name, entry)
        for position in range(entry["samples"]):
            yield shard[position]
