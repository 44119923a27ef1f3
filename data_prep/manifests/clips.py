"""Decides which rows of the manifests are about the same clip: a clip is its audio and its segment, not its id."""

from __future__ import annotations

import hashlib
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from data_prep.audio.fragments import split_fragment, with_fragment
from data_prep.files import container, is_remote, open_audio
from data_prep.manifests.rows import TextRow
from pipeline.core.choices import right_choices
from pipeline.core.feature_contract import Question
from pipeline.core.records import Strict

RejectReason = Literal[
    "duplicate_id",
    "outside_root",
    "empty_field",
    "no_audio",
    "no_class",
    "no_choice",
    "unsupported",
    "bad_segment",
]


class Clip(Strict):
    """One clip of the manifests, with all its questions.

    Attributes:
        root: index of the root (see `reader.audio_roots`) that `audio` is relative to.
        audio: path relative to the root, or absolute; None in a set without encoders.
        start_s, end_s: segment of the audio; None, which is not stored, means its beginning and its end.
    """

    clip_id: str
    root: int
    audio: str | None
    start_s: float | None = None
    end_s: float | None = None
    dataset: str
    domain: str
    questions: list[Question]

    @property
    def address(self) -> str | None:
        """The audio with the fragment of its segment."""
        return None if self.audio is None else with_fragment(self.audio, self.start_s, self.end_s)

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if value is not None or key not in ("start_s", "end_s")}


class RejectedRow(Strict):
    """A row of a manifest that is left out; its reason and detail go to rejects.jsonl."""

    clip_id: str
    reason: RejectReason
    detail: str
    audio: str | None = None


@dataclass(frozen=True)
class SourceRow:
    """A row of a manifest with its audio path resolved.

    Attributes:
        root, audio, start_s, end_s: as of `Clip`.
        location: absolute path or URL of the audio, also of a member, with the fragment of its segment; None in a set
            without encoders.
        others: the other sounds of each question's conversation, as rows without questions.
    """

    row: TextRow
    root: int
    audio: str | None
    location: str | None
    start_s: float | None = None
    end_s: float | None = None
    others: tuple[tuple[SourceRow, ...], ...] = ()

    @property
    def address(self) -> str | None:
        """The audio with the fragment of its segment."""
        return None if self.audio is None else with_fragment(self.audio, self.start_s, self.end_s)


def join_rows(rows: Iterable[SourceRow | RejectedRow]) -> Iterator[Clip | RejectedRow]:
    """Yields one clip per sound with the questions of all its rows, by first appearance; rejected rows come first.

    Two rows are about the same sound if their audio has the same location and segment, or if they share their id and
    are members of archives with the same content (Parquet files with a row per question repeat the audio). The first
    row gives a clip its id, dataset and domain; a question of another dataset or domain keeps its own. A second sound
    with the same id is called `id@audio`. The other sounds of a conversation are clips too, called by their path if no
    row is about them.

    Rows are sorted in a temporary database on disk: the largest corpora have millions of questions, in any order.
    """
    identities = _Identities()
    database = sqlite3.connect("")
    try:
        database.execute("CREATE TABLE rows (sound INTEGER, other INTEGER, row TEXT)")
        for row in rows:
            joined = row if isinstance(row, RejectedRow) else identities.identify(row)
            if isinstance(joined, RejectedRow):
                yield joined
                continue
            for sound, clip in joined:
                other = int(clip is not joined[0][1])
                database.execute("INSERT INTO rows VALUES (?, ?, ?)", (sound, other, clip.model_dump_json()))
        ids = identities.ids_of_other_clips()
        ordered = database.execute("SELECT sound, row FROM rows ORDER BY sound, other, rowid")
        for sound, group in itertools.groupby(ordered, key=lambda pair: pair[0]):
            first, *others = (Clip.model_validate_json(text) for _, text in group)
            questions = [
                _with_clips(_with_source(question, clip, first), ids)
                for clip in (first, *others)
                for question in clip.questions
            ]
            yield first.model_copy(update={"clip_id": ids.get(sound, first.clip_id), "questions": questions})
    finally:
        database.close()


def _with_clips(question: Question, ids: dict[int, str]) -> Question:
    """Returns the question with the ids of its other clips in place of their numbers."""
    if question.clips is None:
        return question
    return question.model_copy(update={"clips": [ids[int(number)] for number in question.clips]})


def _with_source(question: Question, clip: Clip, first: Clip) -> Question:
    """Returns the question with the dataset and domain of its row, where they differ from those of the clip."""
    update = {key: getattr(clip, key) for key in ("dataset", "domain") if getattr(clip, key) != getattr(first, key)}
    return question.model_copy(update=update) if update else question


class _Identities:
    """Gives rows the number of their sound, their clip id and their question ids."""

    def __init__(self) -> None:
        self._sounds: dict[str, int] = {}  # location -> number
        self._names: dict[str, int] = {}  # clip id -> number; a sound may have several ids
        self._question_counts: dict[str, int] = {}  # clip id -> number of questions
        self._question_ids: set[str] = set()
        self._first_members: dict[str, tuple[int, str]] = {}  # id of the row -> number and location, not yet hashed
        self._members: dict[tuple[str, str], int] = {}  # id of the row, hash of the content -> number
        self._others: dict[int, SourceRow] = {}  # number of each other sound of a conversation -> its row
        self._count = 0

    def identify(self, source: SourceRow) -> list[tuple[int, Clip]] | RejectedRow:
        """Returns the row and the other sounds that it names, each with the number of its sound, or the rejected row.

        The questions name their other clips by the numbers of the sounds.
        """
        row = source.row
        if source.location is None and row.clip_id in self._names:
            return RejectedRow(clip_id=row.clip_id, reason="duplicate_id", detail="clip_id occurred before")
        sound = self._count if source.location is None else self._find_sound(row.clip_id, source.location)
        self._count = max(self._count, sound + 1)  # also when the row is rejected: its content may be known by now
        name = self._name(source, sound)
        start = self._question_counts.get(name, 0)
        question_ids = [
            question.question_id or f"{name}/{index}" for index, question in enumerate(row.questions, start)
        ]
        if len(set(question_ids)) < len(question_ids) or not self._question_ids.isdisjoint(question_ids):
            detail = "a question_id occurred before"
            return RejectedRow(clip_id=row.clip_id, reason="duplicate_id", detail=detail, audio=source.audio)
        questions = [
            Question(**{**question.model_dump(exclude={"other_audio"}), "question_id": question_id})
            for question, question_id in zip(row.questions, question_ids, strict=True)
        ]
        for question_id, question in zip(question_ids, questions, strict=True):
            if question.choices and question.answer and not right_choices(question):
                detail = f"question '{question_id}': the answer '{question.answer}' is not among its choices"
                return RejectedRow(clip_id=row.clip_id, reason="no_choice", detail=detail, audio=source.audio)
        if source.location is not None:
            self._sounds[source.location] = sound
        clips = [(sound, _clip(source, name, questions))]
        for index, others in enumerate(source.others):
            numbers = [self._identify_other(other, clips) for other in others]
            questions[index] = questions[index].model_copy(update={"clips": list(map(str, numbers)) or None})
        clips[0] = (sound, _clip(source, name, questions))
        self._question_ids.update(question_ids)
        self._question_counts[name] = start + len(question_ids)
        self._names[name] = sound
        return clips

    def _identify_other(self, other: SourceRow, clips: list[tuple[int, Clip]]) -> int:
        """Returns the number of another sound of a conversation; adds it to the clips where it is new."""
        assert other.location is not None, "a set without audio has no other sounds"
        sound = self._find_sound(other.row.clip_id, other.location)
        if sound == self._count:
            clips.append((sound, _clip(other, other.row.clip_id, [])))
            self._count += 1
        self._sounds[other.location] = sound
        self._others.setdefault(sound, other)
        return sound

    def ids_of_other_clips(self) -> dict[int, str]:
        """Returns the clip id of each sound that a conversation names beside its own, when all rows are identified."""
        ids: dict[int, str] = {}
        for name, sound in self._names.items():
            if sound in self._others:
                ids.setdefault(sound, name)
        for sound, other in self._others.items():
            if sound not in ids:
                ids[sound] = self._name(other, sound)
                self._names[ids[sound]] = sound
        return ids

    def _find_sound(self, row_id: str, location: str) -> int:
        """Returns the number of the sound at a location; the next free number for a new sound.

        Members of archives are hashed only where an id occurs again: that takes reading their audio.
        """
        if location in self._sounds:
            return self._sounds[location]
        if not _is_member(location):
            return self._count
        row_id += location.removeprefix(split_fragment(location)[0])  # segments of one member are different sounds
        if row_id not in self._first_members:
            self._first_members[row_id] = (self._count, location)
            return self._count
        first, first_location = self._first_members[row_id]
        if first_location:
            self._members[row_id, _content_digest(first_location)] = first
            self._first_members[row_id] = (first, "")
        return self._members.setdefault((row_id, _content_digest(location)), self._count)

    def _name(self, source: SourceRow, sound: int) -> str:
        """Returns the id of the row, or one made from it when it is that of another sound."""
        made = f"{source.row.clip_id}@{source.address}"
        for name in itertools.chain((source.row.clip_id, made), (f"{made}#{number}" for number in itertools.count(2))):
            if self._names.get(name, sound) == sound:
                return name
        raise AssertionError("there is always a free name")


def _clip(source: SourceRow, clip_id: str, questions: list[Question]) -> Clip:
    return Clip(
        clip_id=clip_id,
        root=source.root,
        audio=source.audio,
        start_s=source.start_s,
        end_s=source.end_s,
        dataset=source.row.dataset,
        domain=source.row.domain,
        questions=questions,
    )


def _is_member(location: str) -> bool:
    path, *_ = split_fragment(location)
    return container(path) != path


def _content_digest(location: str) -> str:
    """Returns the hash of a member of an archive; its own location if it cannot be read or is empty."""
    try:
        stream = open_audio(split_fragment(location)[0])
    except Exception:  # every kind of archive raises exceptions of its own; the encoding step reports them
        return location
    assert not isinstance(stream, str), "a member has no path of its own"
    with stream:
        content = stream.read()
    return hashlib.sha256(content).hexdigest() if content else location


def absolute_location(path: str) -> str:
    """Returns the location by which two paths to the same file are recognised; links are not followed."""
    return path if is_remote(path) else os.path.abspath(path)  # noqa: PTH100 (resolve() follows links)
