"""Reads manifests of any format as clips with their questions: detects the format and resolves audio paths.

To add an input format, write a reader (path, TableConfig -> ClipRows), add it to `READERS` and to `ManifestFormat` in
`data_prep/config.py`, and make `_detect_format` recognise it.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.audio.fragments import split_fragment, with_fragment
from data_prep.config import PrepareConfig, TableConfig
from data_prep.files import expand, is_remote, open_file, parent
from data_prep.manifests import archive_formats, json_formats, table_formats
from data_prep.manifests.clips import Clip, RejectedRow, RejectReason, SourceRow, absolute_location, join_rows
from data_prep.manifests.rows import AudioSegment, ClipRow, TextRow
from pipeline.core.errors import UserError

READERS: dict[str, Callable[[str, TableConfig], Iterator[ClipRow] | Iterator[ClipRow | RejectedRow]]] = {
    "jsonl": json_formats.read_jsonl,
    "openaqa": json_formats.read_openaqa,
    "slam_llm": json_formats.read_slam_llm,
    "messages": json_formats.read_messages,
    "audio_flamingo": json_formats.read_audio_flamingo,
    "csv": table_formats.read_csv,
    "folder": table_formats.read_folder,
    "parquet": archive_formats.read_parquet,
    "webdataset": archive_formats.read_webdataset,
}
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": "webdataset"}


def manifest_files(config: PrepareConfig) -> list[str]:
    """Returns the manifest files, with patterns expanded.

    Raises:
        UserError: a manifest does not exist, or is given twice.
    """
    paths = [path for manifest in config.manifests for path in expand(manifest)]
    locations: set[str] = set()
    for path in paths:
        if absolute_location(path) in locations:
            raise UserError(path, "is given twice, which would repeat its questions", "remove one from `manifest`")
        locations.add(absolute_location(path))
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


def read_clips(config: PrepareConfig) -> Iterator[Clip | RejectedRow]:
    """Yields the clips of all manifests in order, each once with all its questions (see `clips.join_rows`).

    Rejected rows come before all clips: those with a repeated id, those whose audio path leaves the root, those that a
    feature set cannot hold, and the others of `clips.RejectReason`.

    Raises:
        UserError: a missing manifest, bad JSON, or a row with a missing, unknown or mistyped field; names the file and
            the line or record.
    """
    return join_rows(_source_rows(config))


class _Refused(Exception):
    """The reason and the detail for which the sound of a row cannot be read."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def _source_rows(config: PrepareConfig) -> Iterator[SourceRow | RejectedRow]:
    roots = audio_roots(config)
    for path in manifest_files(config):
        root = roots.index(_root_of(path, config))
        for row in _read_rows(path, config):
            if isinstance(row, RejectedRow):
                yield row
            elif isinstance(row, ClipRow):
                try:
                    yield _source_row(row, root, roots, config)
                except _Refused as refused:
                    yield RejectedRow(clip_id=row.clip_id, reason=refused.reason, detail=refused.detail)
            else:
                yield SourceRow(row, root, None, None)


def _source_row(row: ClipRow, root: int, roots: list[str], config: PrepareConfig) -> SourceRow:
    """Returns a row with its audio path resolved, and with the other sounds of its conversations as rows.

    Raises:
        _Refused: the path of a sound is empty or leaves its root, or its segment has no length.
    """
    audio, start_s, end_s = _resolve(row, config)
    location = with_fragment(absolute_location(_join(roots[root], audio)), start_s, end_s)
    others = tuple(
        tuple(
            _source_row(
                ClipRow(
                    **sound.model_dump(),
                    clip_id=with_fragment(sound.audio, sound.start_s or None, sound.end_s),
                    questions=[],
                    dataset=row.dataset,
                    domain=row.domain,
                ),
                root,
                roots,
                config,
            )
            for sound in question.other_audio
        )
        for question in row.questions
    )
    return SourceRow(row, root, audio, location, start_s, end_s, others)


def _resolve(sound: AudioSegment, config: PrepareConfig) -> tuple[str, float | None, float | None]:
    """Returns the path of a sound relative to its root, or absolute, and its segment.

    Raises:
        _Refused: the path is empty or leaves its root, or the segment has no length.
    """
    if not sound.audio.strip() or "\0" in sound.audio:
        fault = "is empty" if not sound.audio.strip() else "holds a null character"
        raise _Refused("no_audio", f"the audio path {fault}")
    path, start_s, end_s = split_fragment(sound.audio)
    if sound.start_s is not None or sound.end_s is not None:
        if path != sound.audio:
            raise _Refused("bad_segment", f"{sound.audio} names a segment, and the row names another")
        start_s, end_s = sound.start_s, sound.end_s
    if (start_s or 0) < 0 or (end_s is not None and end_s <= (start_s or 0)):
        end = "the end" if end_s is None else f"{end_s:g} s"
        raise _Refused("bad_segment", f"the segment of {path} from {start_s or 0:g} s to {end} has no length")
    mapped, may_be_absolute = _mapped_path(path, config)
    audio = _normalised_path(mapped, may_be_absolute)
    if audio is None:
        absolute = posixpath.isabs(mapped) or is_remote(mapped)
        fault = "is absolute, but audio_root is set" if absolute else "leaves its folder"
        raise _Refused("outside_root", f"the audio path {path} {fault}")
    return audio, start_s or None, end_s


def _read_rows(path: str, config: PrepareConfig) -> Iterator[ClipRow | RejectedRow] | Iterator[TextRow]:
    if not config.encoders:
        return json_formats.read_text(path)
    return READERS[_detect_format(path, config)](path, config.table)


def audio_path(clip: Clip, roots: list[str]) -> str:
    """Returns the path or URL of a clip's audio, with the fragment of its segment (see `audio.fragments`)."""
    assert clip.audio is not None, "clips without a path never reach a partition"
    return with_fragment(_join(roots[clip.root], clip.audio), clip.start_s, clip.end_s)


def _join(root: str, audio: str) -> str:
    return audio if is_remote(audio) else posixpath.join(root, audio)


def manifest_sha256(config: PrepareConfig) -> str:
    """Returns the hash of the manifests' bytes (of the file names, for a folder per class)."""
    digest = hashlib.sha256()
    for path in manifest_files(config):
        if Path(path).is_dir():
            for name in sorted(
                {str(file.relative_to(path)) for file in Path(path).glob("*/**/*") if file.parent != Path(path)}
            ):
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


def _mapped_path(audio: str, config: PrepareConfig) -> tuple[str, bool]:
    """Returns the path of a clip's audio after `audio_paths`, and whether it may be absolute."""
    for prefix in sorted(config.audio_paths, key=len, reverse=True):
        start = prefix.rstrip("/")
        if audio.startswith(f"{start}/"):
            folder = config.audio_paths[prefix]
            path = posixpath.normpath(audio[len(start) :].lstrip("/"))
            if path.split("/", 1)[0] == "..":
                return path, False
            return posixpath.join(folder, path), posixpath.isabs(folder) or is_remote(folder)
    return audio, config.audio_root is None


def _normalised_path(audio: str, may_be_absolute: bool) -> str | None:
    """Returns the normalised path of a clip's audio, or None when it leaves the root (links are not followed)."""
    if is_remote(audio):
        return audio if may_be_absolute else None
    audio = posixpath.normpath(audio)
    if posixpath.isabs(audio):
        return audio if may_be_absolute else None
    return None if audio.split("/", 1)[0] == ".." else audio
