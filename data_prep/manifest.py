"""Reads manifests into clips with their questions. Owns every error that a manifest can have, one line each."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.config import ManifestFormat, PrepareConfig
from pipeline.errors import UserError
from pipeline.features import Question

RowT = TypeVar("RowT", bound=BaseModel)


class _QuestionRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question_id: str | None = None
    question: str
    answer: str
    task: str = "unspecified"
    choices: list[str] | None = None


class _ClipRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    clip_id: str
    audio: str
    questions: list[_QuestionRow]
    dataset: str = "unspecified"
    domain: str = "unspecified"


class _OpenAqaRow(BaseModel):
    # OpenAQA (arXiv 2305.10790) as published: one record per question.
    model_config = ConfigDict(extra="ignore")

    instruction: str
    input: str = ""
    audio_id: str
    dataset: str
    task: str
    output: str


class Clip(BaseModel):
    """One clip of a manifest: where its audio is, and all its questions.

    Attributes:
        root: which of the roots `audio` is relative to (one root per manifest).
        audio: relative to the root, or absolute; None when it leaves the root, and such a clip is rejected.
    """

    model_config = ConfigDict(frozen=True)

    clip_id: str
    root: int
    audio: str | None
    dataset: str
    domain: str
    questions: list[Question]


def audio_roots(config: PrepareConfig) -> list[str]:
    """The folder that relative audio paths of each manifest start from."""
    return [
        posixpath.dirname(manifest) or "." if config.audio_root is None else config.audio_root
        for manifest in config.manifests
    ]


def read_clips(config: PrepareConfig) -> Iterator[Clip]:
    """Yields the clips of all manifests in their order; duplicate ids are yielded as they are.

    Raises:
        UserError: missing manifest, bad JSON, a row without a field or with one of a wrong type; names file and line.
    """
    for root, manifest in enumerate(config.manifests):
        for row in _read_rows(Path(manifest), config.format):
            yield Clip(
                clip_id=row.clip_id,
                root=root,
                audio=_contained(row.audio, may_be_absolute=config.audio_root is None),
                dataset=row.dataset,
                domain=row.domain,
                questions=[
                    Question(**{**q.model_dump(), "question_id": q.question_id or f"{row.clip_id}/{index}"})
                    for index, q in enumerate(row.questions)
                ],
            )


def _read_rows(path: Path, manifest_format: ManifestFormat) -> Iterator[_ClipRow]:
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "no such manifest"
        raise UserError(path, fault, "give an existing manifest file in `manifest`")
    if manifest_format == "auto":
        manifest_format = "openaqa" if path.suffix == ".json" else "jsonl"
    return _read_openaqa(path) if manifest_format == "openaqa" else _read_json_lines(path)


def _contained(audio: str, may_be_absolute: bool) -> str | None:
    """The normalised path of a clip's audio, or None when it leaves the root (links are not followed)."""
    audio = posixpath.normpath(audio)
    if posixpath.isabs(audio):
        return audio if may_be_absolute else None
    return None if audio.split("/", 1)[0] == ".." else audio


def _read_json_lines(path: Path) -> Iterator[_ClipRow]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield _validate(_ClipRow, _parse(line, place), place)


def _read_openaqa(path: Path) -> Iterator[_ClipRow]:
    """Groups records by clip, clips by first appearance, questions in their order."""
    clips: dict[str, _ClipRow] = {}
    for place, value in _json_records(path):
        row = _validate(_OpenAqaRow, value, place)
        clip = clips.setdefault(
            row.audio_id, _ClipRow(clip_id=row.audio_id, audio=row.audio_id, questions=[], dataset=row.dataset)
        )
        question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        clip.questions.append(_QuestionRow(question=question, answer=row.output, task=row.task))
    yield from clips.values()


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """`file:line` and value of each element of a JSON array, one element at a time."""
    text = "".join(_lines(path))
    decoder = json.JSONDecoder()
    position, line, counted = 0, 1, 0

    def skip_blanks(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    position = skip_blanks(position)
    if text[position : position + 1] != "[":
        raise UserError(f"{path}:1", "is not a JSON array", "give a list of records, or choose another `format`")
    position = skip_blanks(position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}", f"bad JSON ({error.msg})", "correct this record") from error
        yield place, value
        position = skip_blanks(position)
        separator = text[position : position + 1]
        if separator == ",":
            position = skip_blanks(position + 1)
        elif separator != "]":
            raise UserError(place, "bad JSON (no comma or ] after this record)", "complete the file")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read ({error})", "give a readable UTF-8 manifest") from error


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(place, f"bad JSON ({error.msg})", "correct this row") from error


def _validate(kind: type[RowT], value: Any, place: str) -> RowT:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        if first["type"] == "missing":
            raise UserError(place, f"row without the field '{field}'", f"add '{field}' to this row") from error
        raise UserError(place, f"field '{field}': {first['msg'].lower()}", "correct this row") from error
