"""Random access to the samples of one MDS folder, local or through a cache of copied shards.

Uses mosaicml-streaming's format, hashes and downloaders, not its StreamingDataset: `sampler` defines the order, and
what StreamingDataset keeps in shared memory outlives a killed job and blocks the next one, whereas the kernel releases
a file lock. Two modules import streaming: this one reads, `data_prep.job.mds_writer` writes.
"""

from __future__ import annotations

import json
import mmap
import os
import uuid
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
from pipeline.core.feature_contract import OPTIONAL_COLUMNS
from pipeline.core.files import file_lock

HASH = "xxh64"
REPAIR = "find all damage with `pal validate`, then restore or prepare the set again"
_INDEX = "index.json"
_DOWNLOAD_ATTEMPTS = 3
_DOWNLOAD_TIMEOUT_S = 120.0
_MAX_EVICTIONS = 8  # times that another process may remove a shard between its check and its use


class MdsReader:
    """Random access to the samples of one MDS folder.

    Checks size and hash of each shard once, before its first sample is used: streaming itself checks only what it
    downloads, so a flipped byte on a disk would decode silently. A cached copy that fails the check is copied again.

    Args:
        folder: local path of the MDS folder, or its URL in an object store (which needs `cache`).
        columns: column name -> MDS type that it must have; a shard may lack those of `OPTIONAL_COLUMNS`.
        cache: local folder for copies of the shards, shared by the ranks of a node and by later jobs; None reads the
            shards in place.
        cache_bytes: approximate limit on the copies, of which the least recently used are removed; None means no limit.

    Raises:
        UserError: the folder, its index or a shard is missing, damaged or of another layout; the message names the
            file.
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
            shard_columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            absent = {name: columns[name] for name in OPTIONAL_COLUMNS & columns.keys() - shard_columns.keys()}
            if {**shard_columns, **absent} != columns or shard.compression:
                fault = f"has columns {shard_columns}, compression {shard.compression}; expected {columns}, none"
                raise UserError(index, fault, "prepare the set with this version")
        self._ends = np.cumsum(self.shard_sizes)
        # Shared by the loader's workers, so that a shard is checked once and not once per worker.
        self._checked = torch.zeros(len(self._shards), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard, in storage order."""
        return [shard.samples for shard in self._shards]

    @property
    def shard_hashes(self) -> list[str]:
        """Hash of each shard as its index has it, in storage order."""
        return [str(shard.raw_data.hashes.get(HASH)) for shard in self._shards]

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = self.shard_of(index)
        for _ in range(_MAX_EVICTIONS):
            reader = self._shards[shard]
            try:
                self.prepare(shard)
                sample: dict[str, Any] = reader[index - int(self._ends[shard]) + reader.samples]
                return sample
            except FileNotFoundError:
                self._checked[shard] = 0
        raise UserError("data.cache_gib", "is too small: shards are removed before they are read", "raise it")

    def samples(self, shard: int) -> list[dict[str, Any]]:
        """Returns all samples of one shard after reading its file once."""
        self.prepare(shard)
        reader = self._shards[shard]
        data = self._file(shard).read_bytes()
        ends = np.frombuffer(data, np.uint32, reader.samples + 1, offset=4)  # MDS: count, then offsets of the samples
        return [reader.decode_sample(data[begin:end]) for begin, end in pairwise(ends)]

    def shard_of(self, index: int) -> int:
        """Returns the index of the shard that contains a sample.

        Raises:
            IndexError: the folder has fewer samples.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def prepare(self, shard: int) -> None:
        """Checks a shard unless this was done before; with a cache, copies it first where there is no intact copy.

        Raises:
            UserError: the shard is missing or damaged, or cannot be copied.
        """
        if self._checked[shard]:
            return
        file = self._file(shard)
        if self._cached:
            with file_lock(file.with_name(f".{file.name}.lock")):
                fault = self._fault(shard)
                if fault is not None:  # also a copy that a full disk or an older set left behind
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
        """Returns what is wrong with a shard's local file; None for an intact one."""
        file, expected = self._file(shard), self._shards[shard].raw_data
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != expected.bytes:
            return f"has {file.stat().st_size} bytes, its index says {expected.bytes}"
        if HASH not in expected.hashes:
            return f"has no {HASH} hash in its index"
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return None if get_hash(HASH, data) == expected.hashes[HASH] else f"has another {HASH} hash than its index"

    def _download(self, shard: int) -> None:
        file = self._file(shard)
        file.unlink(missing_ok=True)
        if self._cache_bytes is not None:
            self._evict(self._cache_bytes - self._shards[shard].raw_data.bytes)
        copy_file(f"{self._source}/{self._shards[shard].raw_data.basename}", file)

    def _evict(self, target_bytes: int) -> None:
        """Removes the least recently used copies until the cache takes at most `target_bytes`."""
        with file_lock(self._folder / ".evict.lock"):
            files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.rglob("*.mds"))
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= target_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size


def copy_file(source: str, target: Path) -> None:
    """Copies a file from a local path or an object store; the target is replaced in one step.

    Raises:
        UserError: the file cannot be copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")

    @retry(num_attempts=_DOWNLOAD_ATTEMPTS)
    def download() -> None:  # opens a new client, since a forked worker must not share its parent's connection
        CloudDownloader.direct_download(source, str(temporary), _DOWNLOAD_TIMEOUT_S)

    try:
        download()
        temporary.replace(target)
    except Exception as error:  # each object store raises its own exceptions
        fault = f"cannot be copied ({error})"
        raise UserError(source, fault, "check that it exists, the credentials, the network, the disk") from error
    finally:
        temporary.unlink(missing_ok=True)
