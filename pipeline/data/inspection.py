"""A feature set for people: its clips and conversations as they are stored, as rows of JSON and as text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from pipeline.core.console import format_duration
from pipeline.core.errors import UserError, nearest
from pipeline.core.feature_contract import Question
from pipeline.core.transcript import Part, Style, field_lines, visible
from pipeline.data.feature_set import Clip, FeatureSet
from pipeline.data.template_parts import AUDIO_TOKEN

_REJECTS = "rejects.jsonl"
_SHOWN_NAMES = 12


class ClipIndex:
    """Finds clips of a feature set by id."""

    def __init__(self, features: FeatureSet) -> None:
        self._features = features

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {self._features.clip(index).clip_id: index for index in range(len(self._features))}

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._indices

    def clips_of(self, clip: Clip, question: Question) -> list[Clip]:
        """Returns the clips that the turns of a question name as 0, 1, ...; none in a set without audio."""
        if self._features.is_text:
            return []
        return [clip, *(self._features.clip(self.find(clip_id)) for clip_id in question.clips or ())]

    def find(self, clip_id: str) -> int:
        """Returns the index of a clip.

        Raises:
            UserError: the set has no such clip; says why if it was rejected, else names the nearest id.
        """
        if clip_id in self._indices:
            return self._indices[clip_id]
        where, folder = f"clip '{clip_id}'", self._features.folder
        if rejected := self._rejected(clip_id):
            fault = f"was rejected when {folder} was prepared ({rejected})"
            raise UserError(where, fault, f"correct it and prepare the set again; all rejects: {folder / _REJECTS}")
        if len(self._indices) <= _SHOWN_NAMES or difflib.get_close_matches(clip_id, self._indices, n=1):
            raise UserError(where, f"is not in {folder}", nearest(clip_id, self._indices))
        first = ", ".join(islice(self._indices, 3))
        raise UserError(where, f"is not in {folder}", f"its {len(self._indices):,} clips begin with {first}")

    def _rejected(self, clip_id: str) -> str | None:
        """Returns the reason and detail with which a clip was rejected; None for a clip that never was."""
        file = self._features.folder / _REJECTS
        for line in file.read_bytes().splitlines() if file.is_file() else []:  # of text, it splits within JSON too
            row = json.loads(line)
            if row["clip_id"] == clip_id:
                return f"{row['reason']}: {row['detail']}"
        return None


class StoredSet:
    """A feature set as it is stored; its entries are clips, in storage order.

    Args:
        features: the set, opened with all its encoders.
    """

    unit = "clips"

    def __init__(self, features: FeatureSet) -> None:
        self.features = features
        self.index = ClipIndex(features)

    def summary(self, style: Style) -> str:
        """Returns what the set holds."""
        contract, table = self.features.contract, self.features.table
        names = [f"{name} ({e.frame_rate_hz:g} frames of {e.width} a second)" for name, e in contract.encoders.items()]
        questions, length = counted(contract.questions, "question"), format_duration(contract.audio_hours * 3600)
        fields = {
            "holds": f"{counted(contract.clips, 'clip')}, {length} of audio, {questions}"
            if names
            else f"{questions} without audio",
            "encoders": ", ".join(names),
            "datasets": _counts(table.datasets, table.dataset),
            "tasks": _counts(table.tasks, table.task),
            "rejected": f"{contract.rejected:,}, listed in {_REJECTS}" if contract.rejected else "",
        }
        lines = [field_lines(label, text, style) for label, text in fields.items() if text]
        return "\n".join([style.heading(str(self.features.folder)), *lines])

    def entries(self, clip_id: str | None) -> tuple[int, Iterator[StoredClip]]:
        """Returns the number of entries, and the entries: all, or those of one clip."""
        indices = range(len(self.features)) if clip_id is None else [self.index.find(clip_id)]
        return len(indices), (StoredClip(self, index) for index in indices)


@dataclass(frozen=True)
class StoredClip:
    """A clip with all its questions as they are stored."""

    source: StoredSet
    index: int

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row for each question; see `question_row`."""
        clip = self.source.features.clip(self.index)
        return [question_row(question, clip, self.source.index.clips_of(clip, question)) for question in clip.questions]

    def text(self, style: Style) -> str:
        """Returns the clip and its conversations for the console."""
        features = self.source.features
        clip = features.clip(self.index)
        frames = {} if features.is_text else features.features(self.index, clip.clip_id)
        lines = [
            style.heading(f"clip {clip.clip_id}"),
            field_lines("source", _source(clip.dataset, clip.domain), style),
        ]
        if not features.is_text:
            lines.append(field_lines("audio", describe_audio(clip), style))
            lines.append(field_lines("frames", describe_frames({k: len(v) for k, v in frames.items()}), style))
        for question in clip.questions:
            lines += ["", *self._question_lines(clip, question, style)]
        return "\n".join(lines if clip.questions else [*lines, "  no questions of its own"])

    def _question_lines(self, clip: Clip, question: Question, style: Style) -> list[str]:
        clips = self.source.index.clips_of(clip, question)
        lines = [f"  {style.heading(question.question_id)}  {describe_question(question)}"]
        for number, other in enumerate(clips[1:], start=2):
            lines.append(field_lines(f"audio {number}", f"{visible(other.clip_id)}: {describe_audio(other)}", style, 4))
        untrained = [turn.role == "assistant" and not turn.loss for turn in question.conversation]
        turns = _turns(question, clips)
        for (role, parts), no_loss in zip(turns, [False] * (len(turns) - len(untrained)) + untrained, strict=True):
            lines.append(field_lines(role, style.conversation(parts), style, 4))
            if no_loss:
                lines.append(field_lines("", "(without loss)", style, 4))
        if question.choices is not None:
            lines.append(field_lines("choices", visible(" | ".join(question.choices)), style, 4))
        return lines


def question_row(question: Question, clip: Clip, clips: Sequence[Clip]) -> dict[str, Any]:
    """Returns a question as JSON: its turns, and the clip at each placeholder of them, in reading order.

    Args:
        clips: the clips that the turns name as 0, 1, ...; empty in a set without audio.
    """
    turns = _turns(question, clips)
    order = [clips[number] for number in clips_in_order(question)] if clips else []
    return {
        "clip_id": clip.clip_id,
        "question_id": question.question_id,
        "audio": [part.audio for part in order],
        "audio_ids": [part.clip_id for part in order],
        "duration_s": [part.duration_s for part in order],
        "dataset": question.dataset or clip.dataset,
        "domain": question.domain or clip.domain,
        "task": question.task,
        "turns": [
            {"role": role, "text": "".join(AUDIO_TOKEN if part.audio else part.text for part in parts)}
            for role, parts in turns
        ],
        "choices": question.choices,
        "answer": question.answer,
    }


def counted(number: int, unit: str) -> str:
    """Returns `1 clip` or `1,200 clips`."""
    return f"{number:,} {unit}{'s' * (number != 1)}"


def clips_in_order(question: Question) -> list[int]:
    """Returns the number of the clip at each placeholder of a question's turns."""
    return [part for turn in question.conversation for part in turn.content if isinstance(part, int)]


def describe_audio(clip: Clip) -> str:
    """Returns length and path of a clip's audio."""
    return f"{clip.duration_s:.2f} s, {visible(clip.audio) or 'path not stored in this set'}"


def describe_frames(frames: dict[str, int]) -> str:
    """Returns the number of frames of each encoder."""
    return ", ".join(f"{count:,} of {name}" for name, count in frames.items())


def describe_question(question: Question) -> str:
    """Returns the labels of a question: its task, and what differs from its clip."""
    labels = {"task": question.task, "dataset": question.dataset, "domain": question.domain}
    return visible(", ".join(f"{name} {label}" for name, label in labels.items() if label is not None))


def _turns(question: Question, clips: Sequence[Clip]) -> list[tuple[str, list[Part]]]:
    """Returns role and parts of each turn, as they are stored."""
    turns = [] if question.system is None else [("system", [Part(question.system)])]
    for turn in question.conversation:
        parts = [
            Part(f"audio {part + 1}" if len(clips) > 1 else "audio", audio=True)
            if isinstance(part, int)
            else Part(part)
            for part in turn.content
            if clips or not isinstance(part, int)
        ]
        turns.append((turn.role, parts))
    return turns


def _source(dataset: str, domain: str) -> str:
    return visible(f"dataset {dataset}, domain {domain}")


def _counts(names: Sequence[str], codes: Any) -> str:
    """Returns the names with their numbers of questions, the most frequent first."""
    counts = np.bincount(codes, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{visible(names[code])} ({counts[code]:,})" for code in order[:_SHOWN_NAMES])
    return f"{shown}, and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else shown
