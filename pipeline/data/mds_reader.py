"""One MDS folder with random access, local or through a cache: the one door to mosaicml-streaming for reading.

streaming's format, hashes and downloaders are used, its StreamingDataset is not: the order is ours, and what it keeps
in shared memory outlives a killed job and blocks the next one, whereas the kernel frees the lock on a file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry

from pipeline.core.errors import UserError

HASH = "xxh64"
REPAIR = "find all damage with `pal validate`, then restore or prepare the set again"
_INDEX = "index.json"
_DOWNLOAD_ATTEMPTS = 3
_DOWNLOAD_TIMEOUT_S = 120.0
_EVICTIONS = 8  # how often another process may remove a shard between its check and its use


class MdsReader:
    """Random access to the samples of one MDS folder. Each shard's size and hash are checked once, before its first
    sample is used (streaming itself checks what it downloads only: a flipped byte on a disk would decode silently).

    Args:
        folder: the MDS folder: a local path, or a URL of an object store (then with `cache`).
        columns: name -> MDS type that it must have.
        cache: local folder for copies of the shards, shared by the ranks of a node and later jobs; None reads in place.
        cache_bytes: the copies take about this much at most, those longest unused are removed; None means no limit.

    Raises:
        UserError: the folder, its index or a shard is absent, damaged or of another layout; the file is named.
    """

    def __init__(
        self, folder: str, columns: dict[str, str], cache: Path | None = None, cache_bytes: int | None = None
    ) -> None:
        self._source = folder
        self._cached = cache is not None
        self._cache_bytes = cache_bytes
        self._folder = Path(folder) if cache is None else cache
        index = f"{folder}/{_INDEX}"
        if self._cached:
            copy_file(index, self._folder / _INDEX)
        if not (self._folder / _INDEX).is_file():
            raise UserError(index, "is missing", REPAIR)
        try:
            entries = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))["shards"]
            self._shards: list[Any] = [reader_from_json(str(self._folder), None, entry) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(index, f"is damaged ({error})", REPAIR) from error
        for shard in self._shards:
            found = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            if found != columns or shard.compression:
                fault = f"has columns {found}, compression {shard.compression}; expected {columns}, none"
                raise UserError(index, fault, "prepare the set with this version")
        self._ends = np.cumsum(self.shard_sizes)
        # Shared by the loader's workers, so that a shard is checked once and not once by each.
        self._checked = torch.zeros(len(self._shards), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard, in storage order."""
        return [shard.samples for shard in self._shards]

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = self.shard_of(index)
        for _ in range(_EVICTIONS):
            self.prepare(shard)
            try:
                sample: dict[str, Any] = self._shards[shard][
                    index - int(self._ends[shard]) + self._shards[shard].samples
                ]
                return sample
            except FileNotFoundError:
                self._checked[shard] = 0
        raise UserError("data.cache_gib", "is too small: shards are removed before they are read", "raise it")

    def samples(self, shard: int) -> list[dict[str, Any]]:
        """All samples of one shard, its file read once."""
        self.prepare(shard)
        reader = self._shards[shard]
        data = self._file(shard).read_bytes()
        ends = np.frombuffer(data, np.uint32, reader.samples + 1, offset=4)  # MDS: count, then offsets of the samples
        return [reader.decode_sample(data[begin:end]) for begin, end in pairwise(ends)]

    def shard_of(self, index: int) -> int:
        """The shard that holds a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def prepare(self, shard: int) -> None:
        """Makes sure that a shard is here and whole; downloads it where there is a cache."""
        if self._checked[shard]:
            return
        file = self._file(shard)
        if self._cached:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _lock(file.with_name(f".{file.name}.lock")):
                if self._fault(shard) is not None:  # also a copy that a full disk or an older set left behind
                    self._download(shard)
                fault = self._fault(shard)
            os.utime(file)
        else:
            fault = self._fault(shard)
        if fault is not None:
            raise UserError(f"{self._source}/{self._shards[shard].raw_data.basename}", fault, REPAIR)
        self._checked[shard] = 1

    def _file(self, shard: int) -> Path:
        return self._folder / self._shards[shard].raw_data.basename

    def _fault(self, shard: int) -> str | None:
        file, expected = self._file(shard), self._shards[shard].raw_data
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != expected.bytes:
            return f"has {file.stat().st_size} bytes, its index says {expected.bytes}"
        if HASH not in expected.hashes:
            return f"has no {HASH} hash in its index"
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return None if get_hash(HASH, data) == expected.hashes[HASH] else f"has another {HASH} than in its index"

    def _download(self, shard: int) -> None:
        file = self._file(shard)
        file.unlink(missing_ok=True)
        if self._cache_bytes is not None:
            self._make_room(self._cache_bytes - self._shards[shard].raw_data.bytes)
        copy_file(f"{self._source}/{self._shards[shard].raw_data.basename}", file)

    def _make_room(self, target_bytes: int) -> None:
        with _lock(self._folder / ".room.lock"):
            files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.rglob("*.mds"))
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= target_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size


def copy_file(source: str, target: Path) -> None:
    """Copies a file from a local path or an object store, replacing the target at once.

    Raises:
        UserError: it cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")

    @retry(num_attempts=_DOWNLOAD_ATTEMPTS)
    def download() -> None:  # with a client of its own, since a forked worker must not share its parent's connection
        CloudDownloader.direct_download(source, str(temporary), _DOWNLOAD_TIMEOUT_S)

    try:
        download()
        temporary.replace(target)
    except Exception as error:  # every kind of object store has exceptions of its own
        fault = f"cannot be copied ({error})"
        raise UserError(source, fault, "check that it exists, the credentials, the network, the disk") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process or thread of the node at a time; freed by the kernel when its owner dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do: a worker forked meanwhile holds it open, too
