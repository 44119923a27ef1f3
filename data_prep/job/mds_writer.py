"""The one door to mosaicml-streaming's shards on the writing side: one partition of one column, and reading it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from streaming import MDSWriter
from streaming.base.format import reader_from_json

from data_prep.job.commits import INDEX, CommittedFile

SHARD_BYTES = 1 << 27  # a clip's features reach megabytes; the library's 64 MiB would hold a handful
MAX_SAMPLE_BYTES = (1 << 32) - SHARD_BYTES  # offsets inside a shard are 32-bit


class MdsWriter:
    """Writes one partition of one column. Nothing counts until `finish` has returned.

    Never a context manager: MDSWriter's own finishes also when the block raised, and a truncated partition would get
    a valid index. No compression: it saves little on features and costs the reader most of its speed.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str]) -> None:
        self.folder = folder
        self.samples = 0
        self._writer = _Writer(columns=dict(columns), out=str(folder), hashes=["xxh64"], size_limit=SHARD_BYTES)

    def write(self, sample: dict[str, Any]) -> None:
        self._writer.write(sample)
        self.samples += 1

    def finish(self) -> list[CommittedFile]:
        """Writes what is left and the index; the files with their sizes and hashes, sorted by name."""
        self._writer.finish()
        return [hash_file(path) for path in sorted(self.folder.iterdir())]

    def abandon(self) -> None:
        """Gives up without an index."""
        self._writer.cancel_future_jobs()


class _Writer(MDSWriter):
    def flush_shard(self) -> None:
        if self.new_samples:  # a first sample above the size limit would leave an empty shard before it
            super().flush_shard()


def hash_file(path: Path) -> CommittedFile:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return CommittedFile(name=path.name, bytes=path.stat().st_size, xxh64=digest.hexdigest())


def read_partition(folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of one partition of one column, in order; arrays are read-only views."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for entry in index["shards"]:
        shard = reader_from_json(str(folder.parent), folder.name, entry)
        for position in range(entry["samples"]):
            yield shard[position]
