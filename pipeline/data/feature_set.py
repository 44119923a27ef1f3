"""A prepared feature set: a table of its questions, and random access to clips and features. Does not know the sampling
order or tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import (
    CLIP_COLUMNS,
    CLIPS,
    CONTRACT_FILE,
    FEATURE_COLUMNS,
    FeatureContract,
    Question,
    load_contract,
    require_encoders,
    require_same_features,
)
from pipeline.core.units import GIB
from pipeline.data.mds_reader import REPAIR, MdsReader, copy_file
from pipeline.data.question_table import read_table


@dataclass(frozen=True)
class Clip:
    """A clip without its features.

    Attributes:
        audio: path or URL of its audio, with the fragment of its segment; empty where the set does not store it.
    """

    clip_id: str
    duration_s: float
    dataset: str
    domain: str
    questions: tuple[Question, ...]
    audio: str = ""

    def domain_of(self, question: Question) -> str:
        """Returns the domain of a question about this clip."""
        return self.domain if question.domain is None else question.domain


class FeatureSet:
    """A prepared set: its contract, its questions, and random access to clips and features.

    Args:
        location: local path of the set, or its URL in an object store.
        encoders: feature columns to read; may be fewer than the set has.
        cache: local folder for copies of the shards of a remote set, shared by the ranks and jobs of this node.
        cache_bytes: approximate limit on the copies of each feature column; None means no limit.

    Attributes:
        folder: the location as a path; of a URL only the name is meaningful.
        encoders: feature columns that are read.
        contract: `features.json` of the set.
        table: all questions as numbers, without those that name a clip which is not in the set.
        left_out: ids of the questions that name such a clip; `clip` leaves them out too.
        clips: reader of the clips, from which `questions_of` takes the questions.

    Raises:
        UserError: the set is not finished, lacks an encoder, has a damaged file, or is a URL without a cache.
    """

    def __init__(
        self,
        location: str | Path,
        encoders: Sequence[str],
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._location = str(location).rstrip("/")
        self.folder = Path(self._location)
        self.encoders = tuple(encoders)
        if "://" in self._location and cache is None:
            raise UserError(self._location, "is remote and has no cache", "set data.cache to a folder on a local disk")
        self._cache = None if cache is None else Path(cache) / hashlib.sha256(self._location.encode()).hexdigest()[:16]
        if self._cache is not None:
            copy_file(f"{self._location}/{CONTRACT_FILE}", self._cache / CONTRACT_FILE)
        self.contract: FeatureContract = load_contract(self._cache or self._location)
        require_encoders(self.contract, list(encoders), self._location)
        self.clips = self._open(CLIPS, CLIP_COLUMNS, None)
        self._features = {name: self._open(name, FEATURE_COLUMNS, cache_bytes) for name in encoders}
        self.table, self.left_out = read_table(self.clips, is_text=self.is_text)
        if len(self.table) != self.contract.questions:
            fault = f"has {len(self.table)} questions, features.json says {self.contract.questions}"
            raise UserError(f"{self._location}/{CLIPS}", fault, REPAIR)

    def _open(self, name: str, columns: dict[str, str], cache_bytes: int | None) -> MdsReader:
        location = f"{self._location}/{name}"
        reader = MdsReader(location, columns, None if self._cache is None else self._cache / name, cache_bytes)
        if len(reader) != self.contract.clips:
            raise UserError(location, f"has {len(reader)} clips, features.json says {self.contract.clips}", REPAIR)
        return reader

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def widths(self) -> dict[str, int]:
        """Encoder -> width of its frames."""
        return {name: self.contract.encoders[name].width for name in self.encoders}

    @property
    def shard_sizes(self) -> list[int]:
        """Clips in each shard of the column with the most shards, the one that is worth reading in order."""
        return max((reader.shard_sizes for reader in (self.clips, *self._features.values())), key=len)

    def clip(self, index: int) -> Clip:
        """Returns a clip with those of its questions that are in the table."""
        sample = self.clips[index]
        return Clip(
            sample["clip_id"],
            sample["duration_s"],
            sample["dataset"],
            sample["domain"],
            self._kept(sample),
            sample.get("audio", ""),
        )

    def features(self, index: int, clip_id: str) -> dict[str, NDArray[np.float16]]:
        """Returns encoder -> (frames, width) float16, read-only.

        Args:
            clip_id: id of the clip at `index`; a column with another id there was swapped or left half-written.

        Raises:
            UserError: a damaged, missing or swapped shard.
        """
        arrays = {}
        for name, reader in self._features.items():
            sample = reader[index]
            if sample["clip_id"] != clip_id:
                fault = f"has clip '{sample['clip_id']}' at {index}, {CLIPS}/ has '{clip_id}' there"
                raise UserError(f"{self._location}/{name}/index.json", fault, REPAIR)
            if sample["features"].ndim != 2 or sample["features"].shape[1] != self.widths[name]:
                fault = f"has features of shape {sample['features'].shape} for clip '{clip_id}', "
                fault += f"features.json says width {self.widths[name]}"
                raise UserError(f"{self._location}/{name}", fault, REPAIR)
            arrays[name] = sample["features"]
        return arrays

    def questions(self) -> Iterator[Question]:
        """Yields the questions of the table, in its order."""
        for shard in range(len(self.clips.shard_sizes)):
            for sample in self.clips.samples(shard):
                yield from self._kept(sample)

    def _kept(self, sample: dict[str, Any]) -> tuple[Question, ...]:
        return questions_of(sample, self.left_out)

    @property
    def questions_sha256(self) -> str:
        """Hash of the contract and of the hashes of all shards with questions."""
        contents = f"{self.contract.dump()}\n{' '.join(self.clips.shard_hashes)}"
        return hashlib.sha256(contents.encode()).hexdigest()

    @property
    def local_folders(self) -> list[Path]:
        """Folders for files about this set: that of a local set, and that of the copies of its shards."""
        own = [] if "://" in self._location else [self.folder]
        return own if self._cache is None else [*own, self._cache]

    @property
    def is_text(self) -> bool:
        """Whether the questions are about no clip, because the set was prepared without an encoder."""
        return not self.contract.encoders

    @property
    def is_cached(self) -> bool:
        """Whether shards are copied to a local cache before they are read."""
        return self._cache is not None

    def prefetch(self, index: int, process: int, num_processes: int) -> None:
        """Prepares the shards with a clip's features, as far as they are this process's share of all shards."""
        for reader in self._features.values():
            shard = reader.shard_of(index)
            if shard % num_processes == process:
                reader.prepare(shard)


def open_feature_set(location: str, encoders: Sequence[str], data: DataConfig) -> FeatureSet:
    """Opens a set through the cache of `data.cache` and `data.cache_gib`.

    Raises:
        UserError: see `FeatureSet`.
    """
    cache_bytes = None if data.cache_gib is None else int(data.cache_gib * GIB)
    return FeatureSet(location, encoders, data.cache, cache_bytes)


def open_mixture(features: FeatureSet, data: DataConfig) -> list[FeatureSet]:
    """Opens the set of each entry of `data.mixture`.

    Args:
        features: the set of `data.train`, which entries without a path share.

    Raises:
        UserError: see `FeatureSet`; or the features of a set were made by other encoders.
    """
    sets = []
    for number, mixed in enumerate(data.mixture):
        if mixed.path is None:
            sets.append(features)
            continue
        text_only = not load_contract(mixed.path).encoders
        sets.append(open_feature_set(mixed.path, [] if text_only else features.encoders, data))
        if not text_only:
            expected = {name: features.contract.encoders[name].fingerprint for name in features.encoders}
            require_same_features(expected, sets[-1].contract, mixed.path, f"data.train (beside data.mixture.{number})")
    return sets


def questions_of(sample: dict[str, Any], left_out: Collection[str] = ()) -> tuple[Question, ...]:
    """Returns the questions of a sample of `FeatureSet.clips`, without those of these ids."""
    questions = (Question.model_validate(question) for question in sample["questions"])
    return tuple(question for question in questions if question.question_id not in left_out)
