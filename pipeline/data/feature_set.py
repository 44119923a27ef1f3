"""A prepared feature set: a table of its questions, and random access to clips and features. Does not know the sampling
order or tokens."""

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
from pipeline.core.units import GIB
from pipeline.data.mds_reader import REPAIR, MdsReader, copy_file


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


@dataclass(frozen=True)
class QuestionTable:
    """All questions of a set as numbers, in storage order; their texts stay in the shards.

    Attributes:
        clip: (questions,) index of each question's clip.
        number: (questions,) index of each question among those of its clip.
        characters: (questions,) characters of question and answer together.
        task, dataset: (questions,) indices into `tasks` and `datasets`.
        duration_s: (clips,) duration of each clip.
        tokens: (questions,) text tokens of each question after the prefix; None until `question_check` counted them.
        fits: (questions,) whether each question can be trained on; None until `question_check` checked them.
    """

    clip: NDArray[np.int64]
    number: NDArray[np.int32]
    characters: NDArray[np.int32]
    task: NDArray[np.int32]
    dataset: NDArray[np.int32]
    tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    duration_s: NDArray[np.float64]
    tokens: NDArray[np.int64] | None = None
    fits: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.clip)

    def select(
        self, tasks: Sequence[str] | None = None, datasets: Sequence[str] | None = None, key: str = "data"
    ) -> NDArray[np.int64]:
        """Returns the indices of the questions of these tasks and datasets that fit; None selects all.

        Args:
            key: config key of the selection, for error messages.

        Raises:
            UserError: the set does not have a task or dataset of this name, or nothing is selected.
        """
        is_selected = np.ones(len(self), bool)
        for field, requested, known, codes in (
            ("tasks", tasks, self.tasks, self.task),
            ("datasets", datasets, self.datasets, self.dataset),
        ):
            if requested is not None:
                for name in requested:
                    if name not in known:
                        raise UserError(f"{key}.{field}", f"the feature set has no '{name}'", nearest(name, known))
                is_selected &= np.isin(codes, [known.index(name) for name in requested])
        if not is_selected.any():
            raise UserError(key, "its tasks and datasets together select no question", "widen one of them")
        return np.flatnonzero(is_selected if self.fits is None else is_selected & self.fits)


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
        table: all questions as numbers.
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
        self.table = self._read_table()

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
        """Returns a clip with all its questions."""
        return _clip(self.clips[index])

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
        """Yields all questions, in storage order."""
        for shard in range(len(self.clips.shard_sizes)):
            for sample in self.clips.samples(shard):
                yield from _clip(sample).questions

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

    def _read_table(self) -> QuestionTable:
        tasks: dict[str, int] = {}
        datasets: dict[str, int] = {}
        shard_rows: list[NDArray[np.int64]] = []
        durations: list[float] = []
        for shard in range(len(self.clips.shard_sizes)):
            rows: list[tuple[int, int, int, int, int]] = []
            for sample in self.clips.samples(shard):
                dataset = datasets.setdefault(sample["dataset"], len(datasets))
                for number, question in enumerate(sample["questions"]):
                    source = question.get("dataset")
                    source_code = dataset if source is None else datasets.setdefault(source, len(datasets))
                    characters = len(question["question"]) + len(question["answer"])
                    task = tasks.setdefault(question["task"], len(tasks))
                    rows.append((len(durations), number, characters, task, source_code))
                durations.append(sample["duration_s"])
            shard_rows.append(np.array(rows, np.int64).reshape(-1, 5))
        clip, question_numbers, character_counts, task_codes, dataset_codes = np.concatenate(shard_rows).T
        if len(clip) != self.contract.questions:
            fault = f"has {len(clip)} questions, features.json says {self.contract.questions}"
            raise UserError(f"{self._location}/{CLIPS}", fault, REPAIR)
        return QuestionTable(
            clip=np.ascontiguousarray(clip),
            number=np.ascontiguousarray(question_numbers, np.int32),
            characters=np.ascontiguousarray(character_counts, np.int32),
            task=np.ascontiguousarray(task_codes, np.int32),
            dataset=np.ascontiguousarray(dataset_codes, np.int32),
            tasks=tuple(tasks),
            datasets=tuple(datasets),
            duration_s=np.array(durations),
        )


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


def questions_of(sample: dict[str, Any]) -> tuple[Question, ...]:
    """Returns the questions of a sample of `FeatureSet.clips`."""
    return tuple(Question.model_validate(question) for question in sample["questions"])


def _clip(sample: dict[str, Any]) -> Clip:
    values = [sample[name] for name in ("clip_id", "duration_s", "dataset", "domain")]
    return Clip(*values, questions_of(sample), sample.get("audio", ""))
