"""A prepared feature set: its questions in numbers, and random access to clips and features. Knows nothing of order or
tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.core.errors import UserError, nearest
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
from pipeline.data.mds_reader import REPAIR, MdsReader, copy_file


@dataclass(frozen=True)
class Clip:
    """What is known of a clip beside its features."""

    clip_id: str
    duration_s: float
    dataset: str
    domain: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class QuestionTable:
    """All questions of a set in numbers, in storage order; texts stay in the shards.

    Attributes:
        clip: (questions,) index of the clip.
        number: (questions,) which question of its clip.
        characters: (questions,) of question and answer together.
        task, dataset: (questions,) indices into `tasks` and `datasets`.
        duration_s: (clips,).
    """

    clip: NDArray[np.int64]
    number: NDArray[np.int32]
    characters: NDArray[np.int32]
    task: NDArray[np.int32]
    dataset: NDArray[np.int32]
    tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    duration_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.clip)

    def select(
        self, tasks: Sequence[str] | None = None, datasets: Sequence[str] | None = None, key: str = "data"
    ) -> NDArray[np.int64]:
        """Indices of the questions of these tasks and datasets; None keeps all.

        Args:
            key: of the config that asks, for messages.

        Raises:
            UserError: a name that the set does not have, or nothing selected.
        """
        keep = np.ones(len(self), bool)
        for field, wanted, known, codes in (
            ("tasks", tasks, self.tasks, self.task),
            ("datasets", datasets, self.datasets, self.dataset),
        ):
            if wanted is not None:
                for name in wanted:
                    if name not in known:
                        raise UserError(f"{key}.{field}", f"the feature set has no '{name}'", nearest(name, known))
                keep &= np.isin(codes, [known.index(name) for name in wanted])
        if not keep.any():
            raise UserError(key, "its tasks and datasets together select no question", "widen one of them")
        return np.flatnonzero(keep)


class FeatureSet:
    """A prepared set: its contract, its questions, and random access to clips and features.

    Args:
        folder: the set: a local path, or a URL of an object store.
        encoders: feature columns to read; may be fewer than the set holds.
        cache: local folder that keeps copies of the shards of a far folder, shared by ranks and jobs of this node.
        cache_bytes: the copies of each feature column take about this much at most; None means no limit.

    Raises:
        UserError: not a finished set, an encoder that it does not have, a damaged file, a URL without a cache.
    """

    def __init__(
        self,
        folder: str | Path,
        encoders: Sequence[str],
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._place = str(folder).rstrip("/")
        self.folder = Path(self._place)  # of a URL only the name means anything
        self.encoders = tuple(encoders)
        if "://" in self._place and cache is None:
            raise UserError(self._place, "is far and has no cache", "set data.cache to a folder on a local disk")
        self._cache = None if cache is None else Path(cache) / hashlib.sha256(self._place.encode()).hexdigest()[:16]
        if self._cache is not None:
            copy_file(f"{self._place}/{CONTRACT_FILE}", self._cache / CONTRACT_FILE)
        self.contract: FeatureContract = load_contract(self._cache or self._place)
        require_encoders(self.contract, list(encoders), self._place)
        self._clips = self._open(CLIPS, CLIP_COLUMNS, None)
        self._features = {name: self._open(name, FEATURE_COLUMNS, cache_bytes) for name in encoders}
        self.table = self._read_table()

    def _open(self, name: str, columns: dict[str, str], cache_bytes: int | None) -> MdsReader:
        place = f"{self._place}/{name}"
        column = MdsReader(place, columns, None if self._cache is None else self._cache / name, cache_bytes)
        if len(column) != self.contract.clips:
            raise UserError(place, f"holds {len(column)} clips, features.json says {self.contract.clips}", REPAIR)
        return column

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def widths(self) -> dict[str, int]:
        """Encoder -> width of its frames."""
        return {name: self.contract.encoders[name].width for name in self.encoders}

    @property
    def shard_sizes(self) -> list[int]:
        """Clips in each shard of the column with the most shards, the one worth reading in order."""
        return max((column.shard_sizes for column in (self._clips, *self._features.values())), key=len)

    def clip(self, index: int) -> Clip:
        """A clip with all its questions."""
        return _clip(self._clips[index])

    def features(self, index: int, clip_id: str) -> dict[str, NDArray[np.float16]]:
        """Encoder -> (frames, width) float16, read-only.

        Args:
            clip_id: of the clip at `index`; a column that holds another one there was swapped or left half-written.

        Raises:
            UserError: a damaged, missing or swapped shard.
        """
        arrays = {}
        for name, column in self._features.items():
            sample = column[index]
            if sample["clip_id"] != clip_id:
                fault = f"has clip '{sample['clip_id']}' at {index}, {CLIPS}/ has '{clip_id}' there"
                raise UserError(f"{self._place}/{name}/index.json", fault, REPAIR)
            if sample["features"].ndim != 2 or sample["features"].shape[1] != self.widths[name]:
                fault = f"has features of shape {sample['features'].shape} for clip '{clip_id}', not of the contract's"
                raise UserError(f"{self._place}/{name}", f"{fault} width {self.widths[name]}", REPAIR)
            arrays[name] = sample["features"]
        return arrays

    def questions(self) -> Iterator[Question]:
        """All questions, in storage order."""
        for shard in range(len(self._clips.shard_sizes)):
            for sample in self._clips.samples(shard):
                yield from _clip(sample).questions

    @property
    def is_text(self) -> bool:
        """Whether its questions are about no clip: it was prepared without an encoder."""
        return not self.contract.encoders

    @property
    def is_cached(self) -> bool:
        """Whether shards are copied from far away before they are read."""
        return self._cache is not None

    def prefetch(self, index: int, part: int, parts: int) -> None:
        """Makes sure that the shards with a clip's features are here; of `parts` processes each sees to its share."""
        for column in self._features.values():
            shard = column.shard_of(index)
            if shard % parts == part:
                column.prepare(shard)

    def _read_table(self) -> QuestionTable:
        tasks: dict[str, int] = {}
        datasets: dict[str, int] = {}
        parts: list[NDArray[np.int64]] = []
        durations: list[float] = []
        for shard in range(len(self._clips.shard_sizes)):
            rows: list[tuple[int, int, int, int, int]] = []
            for sample in self._clips.samples(shard):
                dataset = datasets.setdefault(sample["dataset"], len(datasets))
                for number, question in enumerate(sample["questions"]):
                    characters = len(question["question"]) + len(question["answer"])
                    task = tasks.setdefault(question["task"], len(tasks))
                    rows.append((len(durations), number, characters, task, dataset))
                durations.append(sample["duration_s"])
            parts.append(np.array(rows, np.int64).reshape(-1, 5))
        clip, *rest = np.concatenate(parts).T
        if len(clip) != self.contract.questions:
            fault = f"holds {len(clip)} questions, features.json says {self.contract.questions}"
            raise UserError(f"{self._place}/{CLIPS}", fault, REPAIR)
        number_, characters_, task_, dataset_ = (np.ascontiguousarray(column, np.int32) for column in rest)
        return QuestionTable(
            np.ascontiguousarray(clip),
            number_,
            characters_,
            task_,
            dataset_,
            tuple(tasks),
            tuple(datasets),
            np.array(durations),
        )


def open_feature_set(place: str, encoders: Sequence[str], data: DataConfig) -> FeatureSet:
    """A set read as `data.cache` and `data.cache_gib` say.

    Raises:
        UserError: as `FeatureSet`.
    """
    cache_bytes = None if data.cache_gib is None else int(data.cache_gib * 2**30)
    return FeatureSet(place, encoders, data.cache, cache_bytes)


def open_mixture(features: FeatureSet, data: DataConfig) -> list[FeatureSet]:
    """The set of each entry of `data.mixture`, beside `features`, the set of `data.train`.

    Raises:
        UserError: as `FeatureSet`; or features made by other encoders.
    """
    sets = []
    for number, other in enumerate(data.mixture):
        if other.path is None:
            sets.append(features)
            continue
        text_only = not load_contract(other.path).encoders
        sets.append(open_feature_set(other.path, [] if text_only else features.encoders, data))
        if not text_only:
            expected = {name: features.contract.encoders[name].fingerprint for name in features.encoders}
            require_same_features(expected, sets[-1].contract, other.path, f"data.train (beside data.mixture.{number})")
    return sets


def _clip(sample: dict[str, Any]) -> Clip:
    questions = tuple(Question.model_validate(question) for question in sample["questions"])
    return Clip(sample["clip_id"], sample["duration_s"], sample["dataset"], sample["domain"], questions)
