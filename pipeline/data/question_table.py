"""The table of a feature set's questions: their clips, tasks, datasets and sizes as numbers, without their texts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError, nearest
from pipeline.data.mds_reader import REPAIR, MdsReader


@dataclass(frozen=True)
class QuestionTable:
    """All questions of a set as numbers, in storage order; their texts stay in the shards.

    Attributes:
        clip: (questions,) index of each question's clip.
        number: (questions,) index of each question among those of its clip that are in the table.
        characters: (questions,) characters of question and answer together.
        task, dataset: (questions,) indices into `tasks` and `datasets`.
        duration_s: (clips,) duration of each clip.
        prefix: (questions,) code of everything up to the first placeholder, its clip included: questions of a clip
            with the same code agree in it, and 0 is that of plain questions; None means all 0.
        audio: index of a question -> index of the clip at each of its placeholders, in order, for the questions that
            read something else than their own clip alone; without the placeholders of text sets.
        tokens: (questions,) text tokens of each question after the first placeholder; None until `question_check`
            counted them.
        prefix_tokens: (questions,) text tokens up to and including the first placeholder; None as for `tokens`.
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
    prefix: NDArray[np.int32] | None = None
    audio: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    tokens: NDArray[np.int64] | None = None
    prefix_tokens: NDArray[np.int64] | None = None
    fits: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.clip)

    def audio_of(self, questions: Sequence[int] | NDArray[np.integer], clip: int) -> tuple[int, ...]:
        """Returns the index of the clip at each placeholder of a row of these questions, which share the first one.

        Args:
            clip: the clip of the questions.
        """
        audio = [self.audio.get(int(question), (clip,)) for question in questions]
        return (clip,) if not audio else audio[0][:1] + tuple(other for clips in audio for other in clips[1:])

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
        for selection, requested, known, codes in (
            ("tasks", tasks, self.tasks, self.task),
            ("datasets", datasets, self.datasets, self.dataset),
        ):
            if requested is not None:
                for name in requested:
                    if name not in known:
                        raise UserError(f"{key}.{selection}", f"the feature set has no '{name}'", nearest(name, known))
                is_selected &= np.isin(codes, [known.index(name) for name in requested])
        if not is_selected.any():
            raise UserError(key, "its tasks and datasets together select no question", "widen one of them")
        return np.flatnonzero(is_selected if self.fits is None else is_selected & self.fits)


def read_table(clips: MdsReader, *, is_text: bool) -> tuple[QuestionTable, frozenset[str]]:
    """Reads the table of a set, and the ids of the questions that name a clip which is not in the set.

    Args:
        clips: reader of the clips with their questions.
        is_text: whether the questions are about no clip.

    Raises:
        UserError: a shard is damaged, or a conversation names a clip beyond `Question.clips`.
    """
    tasks: dict[str, int] = {}
    datasets: dict[str, int] = {}
    shard_rows: list[NDArray[np.int64]] = []
    durations: list[float] = []
    conversations: dict[int, tuple[str, list[str | None]]] = {}  # question -> its id, and the clip at each placeholder
    total = 0
    for shard in range(len(clips.shard_sizes)):
        rows: list[tuple[int, int, int, int, int]] = []
        for sample in clips.samples(shard):
            dataset = datasets.setdefault(sample["dataset"], len(datasets))
            prefixes: dict[Hashable, int] = {_prefix({}, is_text): 0}
            for question in sample["questions"]:
                source = question.get("dataset")
                source_code = dataset if source is None else datasets.setdefault(source, len(datasets))
                characters = len(question["question"]) + len(question["answer"])
                task = tasks.setdefault(question["task"], len(tasks))
                prefix = prefixes.setdefault(_prefix(question, is_text), len(prefixes))
                if question.get("turns") is not None and not is_text:
                    conversations[total + len(rows)] = question["question_id"], _clips_of(question)
                rows.append((len(durations), characters, task, source_code, prefix))
            durations.append(sample["duration_s"])
        total += len(rows)
        shard_rows.append(np.array(rows, np.int64).reshape(-1, 5))
    columns = np.concatenate(shard_rows)
    index_of = _find(clips, {clip_id for _, ids in conversations.values() for clip_id in ids if clip_id is not None})
    missing = {q for q, (_, ids) in conversations.items() if any(c is not None and c not in index_of for c in ids)}
    kept = np.delete(np.arange(total), sorted(missing))
    new_index = np.cumsum(np.isin(np.arange(total), kept)) - 1
    audio = {}
    for question, (_, ids) in conversations.items():
        own = int(columns[question, 0])
        indices = tuple(own if clip_id is None else index_of[clip_id] for clip_id in ids if question not in missing)
        if question not in missing and indices != (own,):
            audio[int(new_index[question])] = indices
    clip, character_counts, task_codes, dataset_codes, prefix_codes = columns[kept].T
    table = QuestionTable(
        clip=np.ascontiguousarray(clip),
        number=(np.arange(len(clip)) - np.searchsorted(clip, clip)).astype(np.int32),
        characters=np.ascontiguousarray(character_counts, np.int32),
        task=np.ascontiguousarray(task_codes, np.int32),
        dataset=np.ascontiguousarray(dataset_codes, np.int32),
        tasks=tuple(tasks),
        datasets=tuple(datasets),
        duration_s=np.array(durations),
        prefix=np.ascontiguousarray(prefix_codes, np.int32) if prefix_codes.any() else None,
        audio=audio,
    )
    return table, frozenset(conversations[question][0] for question in missing)


def _prefix(question: Mapping[str, Any], is_text: bool) -> Hashable:
    """Returns what determines a question up to its first placeholder, equal where questions may share a row."""
    system, turns = question.get("system"), question.get("turns")
    if turns is None:
        return system, "", None if is_text else 0
    parts = [part for turn in turns for part in turn["content"] if isinstance(part, int)]
    if not parts:
        return system, "", None
    content = turns[0]["content"]
    if not any(isinstance(part, int) for part in content):
        return question["question_id"]  # an answer precedes the first clip: the question shares no row
    first = next(number for number, part in enumerate(content) if isinstance(part, int))
    return system, "".join(content[:first]).lstrip(), _clips_of(question)[0] or 0


def _clips_of(question: Mapping[str, Any]) -> list[str | None]:
    """Returns the id of the clip at each placeholder of a conversation; None for the clip of the question."""
    ids = [None, *(question.get("clips") or [])]
    numbers = [part for turn in question["turns"] for part in turn["content"] if isinstance(part, int)]
    if any(not 0 <= number < len(ids) for number in numbers):
        raise UserError(f"question '{question['question_id']}'", "names a clip that is not among its clips", REPAIR)
    return [ids[number] for number in numbers]


def _find(clips: MdsReader, clip_ids: set[str]) -> dict[str, int]:
    """Returns the index of each of these clips that is in the set."""
    found = {}
    first = 0
    for shard, size in enumerate(clips.shard_sizes if clip_ids else []):
        for index, sample in enumerate(clips.samples(shard), start=first):
            if sample["clip_id"] in clip_ids:
                found[sample["clip_id"]] = index
        first += size
    return found
