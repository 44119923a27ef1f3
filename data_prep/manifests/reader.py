"""Reads manifests of any format as clips with their questions: detects the format and resolves audio paths.

To add an input format, write a reader (path, TableConfig -> ClipRows), add it to `READERS` and to `ManifestFormat` in
`data_prep/config.py`, and make `_detect_format` recognise it.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.config import PrepareConfig, TableConfig
from data_prep.files import expand, is_remote, open_file, parent
from data_prep.manifests import json_formats, table_formats
from data_prep.manifests.rows import ClipRow, TextRow
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.records import Strict

READERS: dict[str, Callable[[str, TableConfig], Iterator[ClipRow]]] = {
    "jsonl": json_formats.read_jsonl,
    "openaqa": json_formats.read_openaqa,
    "slam_llm": json_formats.read_slam_llm,
    "messages": json_formats.read_messages,
    "audio_flamingo": json_formats.read_audio_flamingo,
    "csv": table_formats.read_csv,
    "folder": table_formats.read_folder,
    "parquet": table_formats.read_parquet,
    "webdataset": table_formats.read_webdataset,
}
SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".tar": "webdataset"}


class Clip(Strict):
    """One clip of a manifest, with all its questions.

    Attributes:
        root: index of the root (see `audio_roots`) that `audio` is relative to.
        audio: path relative to the root, or absolute; None in a set without encoders, or when the path leaves the
            root, in which case the clip is rejected.
    """

    clip_id: str
    root: int
    audio: str | None
    dataset: str
    domain: str
    questions: list[Question]


def manifest_files(config: PrepareConfig) -> list[str]:
    """Returns the manifest files, with patterns expanded.

    Raises:
        UserError: a manifest does not exist.
    """
    paths = [path for manifest in config.manifests for path in expand(manifest)]
    for path in paths:
        if not is_remote(path) and not Path(path).exists():
            raise UserError(path, "no such manifest", "give an existing manifest in `manifest`")
    return paths


def audio_roots(config: PrepareConfig) -> list[str]:
    """Returns the distinct folders that relative audio paths start from."""
    return list(dict.fromkeys(_root_of(path, config) for path in manifest_files(config)))


def _root_of(path: str, config: PrepareConfig) -> str:
    if config.audio_root is not None:
        return config.audio_root
    return path if Path(path).is_dir() else parent(path)


def read_clips(config: PrepareConfig) -> Iterator[Clip]:
    """Yields the clips of all manifests in order, clips with duplicate ids included.

    Raises:
        UserError: a missing manifest, bad JSON, or a row with a missing, unknown or mistyped field; names the file and
            the line or record.
    """
    roots = audio_roots(config)
    for path in manifest_files(config):
        root = roots.index(_root_of(path, config))
        for row in _read_rows(path, config):
            audio = row.audio if isinstance(row, ClipRow) else None
            yield Clip(
                clip_id=row.clip_id,
                root=root,
                audio=None if audio is None else _normalised_path(audio, may_be_absolute=config.audio_root is None),
                dataset=row.dataset,
                domain=row.domain,
                questions=[
                    Question(**{**q.model_dump(), "question_id": q.question_id or f"{row.clip_id}/{index}"})
                    for index, q in enumerate(row.questions)
                ],
            )


def _read_rows(path: str, config: PrepareConfig) -> Iterator[ClipRow] | Iterator[TextRow]:
    if not config.encoders:
        return json_formats.read_text(path)
    return READERS[_detect_format(path, config)](path, config.table)


def audio_path(clip: Clip, roots: list[str]) -> str:
    """Returns the path or URL of a clip's audio."""
    assert clip.audio is not None, "clips without a path never reach a partition"
    return clip.audio if is_remote(clip.audio) else posixpath.join(roots[clip.root], clip.audio)


def manifest_sha256(config: PrepareConfig) -> str:
    """Returns the hash of the manifests' bytes (of the file names, for a folder per class)."""
    digest = hashlib.sha256()
    for path in manifest_files(config):
        if Path(path).is_dir():
            for name in sorted(str(file.relative_to(path)) for file in Path(path).glob("*/*")):
                digest.update(f"{name}\n".encode())
            continue
        with open_file(path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _detect_format(path: str, config: PrepareConfig) -> str:
    is_folder = Path(path).is_dir()
    if config.format != "auto":
        if is_folder != (config.format == "folder"):
            raise UserError(path, f"is {'' if is_folder else 'not '}a folder", f"format is {config.format}: correct it")
        return config.format
    if is_folder:
        return "folder"
    return SUFFIXES.get(posixpath.splitext(path)[1].lower()) or json_formats.detect(path)


def _normalised_path(audio: str, may_be_absolute: bool) -> str | None:
    """Returns the normalised path of a clip's audio, or None when it leaves the root (links are not followed)."""
    if is_remote(audio):
        return audio if may_be_absolute else None
    audio = posixpath.normpath(audio)
    if posixpath.isabs(audio):
        return audio if may_be_absolute else None
    return None if audio.split("/", 1)[0] == ".." else audio
