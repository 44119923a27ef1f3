"""Reads a prepared feature set: the one door to mosaicml-streaming for reading. Knows nothing of order or tokens."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.distributed import read_ranks
from pipeline.errors import UserError, nearest
from pipeline.features import (
    CLIP_COLUMNS,
    CLIPS,
    FEATURE_COLUMNS,
    FeatureContract,
    Question,
    load_contract,
    require_encoders,
)

read_ranks()  # sets LOCAL_WORLD_SIZE, which streaming reads
from streaming import LocalDataset  # noqa: E402
from streaming.base.hashing import get_hash  # noqa: E402

HASH = "xxh64"
_REPAIR = "find all damage with `pal validate`, then restore or prepare the set again"


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

    def select(self, tasks: Sequence[str] | None = None, datasets: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Indices of the questions of these tasks and datasets; None keeps all.

        Raises:
            UserError: a name that the set does not have, or nothing selected.
        """
        keep = np.ones(len(self), bool)
        for key, wanted, known, codes in (
            ("data.tasks", tasks, self.tasks, self.task),
            ("data.datasets", datasets, self.datasets, self.dataset),
        ):
            if wanted is not None:
                for name in wanted:
                    if name not in known:
                        raise UserError(key, f"the feature set has no '{name}'", nearest(name, known))
                keep &= np.isin(codes, [known.index(name) for name in wanted])
        if not keep.any():
            raise UserError("data", "data.tasks and data.datasets together select no question", "widen one of them")
        return np.flatnonzero(keep)


class Column:
    """One MDS folder with random access. Each shard's size and hash are checked once, before its first sample is used.

    streaming checks hashes of what it downloads only, so a flipped byte on a local disk would decode silently.

    Raises:
        UserError: the folder, its index or a shard is absent, damaged or of another layout; the file is named.
    """

    def __init__(self, folder: Path, columns: dict[str, str]) -> None:
        self._folder = folder
        index = folder / "index.json"
        if not index.is_file():
            raise UserError(index, "is missing", _REPAIR)
        try:
            self._dataset = LocalDataset(str(folder))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(index, f"is damaged ({error!r})", _REPAIR) from error
        self._shards: list[Any] = self._dataset.shards
        for shard in self._shards:
            found = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            if found != columns:
                fault = f"has columns {found}, expected {columns}"
                raise UserError(index, fault, "prepare the set with this version")
        # Shared by the loader's workers, so that a shard is checked once and not once by each.
        self._checked = torch.zeros(len(self._shards), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard, in storage order."""
        return [shard.samples for shard in self._shards]

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, number = self._dataset.spanner[index]
        self._check(shard)
        sample: dict[str, Any] = self._shards[shard][number]
        return sample

    def samples(self, shard: int) -> list[dict[str, Any]]:
        """All samples of one shard, its file read once."""
        self._check(shard)
        reader = self._shards[shard]
        data = self._file(shard).read_bytes()
        ends = np.frombuffer(data, np.uint32, reader.samples + 1, offset=4)  # MDS: count, then offsets of the samples
        return [reader.decode_sample(data[begin:end]) for begin, end in pairwise(ends)]

    def _file(self, shard: int) -> Path:
        return self._folder / self._shards[shard].raw_data.basename

    def _check(self, shard: int) -> None:
        if self._checked[shard]:
            return
        file, expected = self._file(shard), self._shards[shard].raw_data
        if not file.is_file():
            raise UserError(file, "is missing", _REPAIR)
        if file.stat().st_size != expected.bytes:
            fault = f"has {file.stat().st_size} bytes, its index says {expected.bytes}"
            raise UserError(file, fault, _REPAIR)
        if HASH not in expected.hashes:
            raise UserError(file, f"has no {HASH} hash in its index", "prepare the set with this version")
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if get_hash(HASH, data) != expected.hashes[HASH]:
                raise UserError(file, f"is damaged (its {HASH} differs from its index)", _REPAIR)
        self._checked[shard] = 1


class FeatureSet:
    """A prepared set: its contract, its questions, and random access to clips and features.

    Args:
        folder: the set.
        encoders: feature columns to read; may be fewer than the set holds.

    Raises:
        UserError: not a finished set, an encoder that it does not have, or a damaged file.
    """

    def __init__(self, folder: str | Path, encoders: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.encoders = tuple(encoders)
        self.contract: FeatureContract = load_contract(folder)
        require_encoders(self.contract, list(encoders), folder)
        self._clips = Column(self.folder / CLIPS, CLIP_COLUMNS)
        self._features = {name: Column(self.folder / name, FEATURE_COLUMNS) for name in encoders}
        for name, column in {CLIPS: self._clips, **self._features}.items():
            if len(column) != self.contract.clips:
                fault = f"holds {len(column)} clips, features.json says {self.contract.clips}"
                raise UserError(self.folder / name, fault, _REPAIR)
        self.table = self._read_table()

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
                raise UserError(self.folder / name / "index.json", fault, _REPAIR)
            if sample["features"].ndim != 2 or sample["features"].shape[1] != self.widths[name]:
                fault = f"has features of shape {sample['features'].shape} for clip '{clip_id}', not of the contract's"
                raise UserError(self.folder / name, f"{fault} width {self.widths[name]}", _REPAIR)
            arrays[name] = sample["features"]
        return arrays

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
            raise UserError(self.folder / CLIPS, fault, _REPAIR)
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


def _clip(sample: dict[str, Any]) -> Clip:
    questions = tuple(Question.model_validate(question) for question in sample["questions"])
    return Clip(sample["clip_id"], sample["duration_s"], sample["dataset"], sample["domain"], questions)
