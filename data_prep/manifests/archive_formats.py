"""Reads archives with embedded audio: Parquet and WebDataset."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.audio.containers import (
    DECODABLE_SUFFIXES,
    HEAD_BYTES,
    is_audio,
    is_hidden,
    suffix,
)
from data_prep.config import TableConfig
from data_prep.files import audio_column, audio_columns, open_file
from data_prep.manifests.clips import RejectedRow
from data_prep.manifests.json_records import parse_json
from data_prep.manifests.rows import ClipRow
from data_prep.manifests.table_rows import fill_row, holds_conversations
from data_prep.manifests.templates import TableRow, refuse_unused_times
from pipeline.core.console import logger
from pipeline.core.errors import UserError


def read_parquet(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields the rows of a Hugging Face dataset with embedded audio; the other columns are the fields.

    A row that holds a path but no bytes takes its audio from that file; a row with neither is rejected. Conversations
    may have several sounds, in a list, or name files.

    Raises:
        UserError: the file is not Parquet, has no column, or several, of embedded audio, or has a column of lists of
            sounds and no conversations.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            schema = file.schema_arrow
            names = dict.fromkeys(schema.names)
            refuse_unused_times(table, names, path)
            is_conversation = holds_conversations(names, table)
            if is_conversation and not audio_columns(schema):
                yield from _rows_about_files(file, path, table)
                return
            column = audio_column(schema, path)
            has_lists = hasattr(schema.field(column).type, "value_type")
            if has_lists and not is_conversation:
                remedy = "give a file with one sound a row, or with the conversations in a column `messages`"
                raise UserError(path, f"has a list of sounds in its column '{column}'", remedy)
            for group in range(file.num_row_groups):
                parts = [*(name for name in names if name != column), column if has_lists else f"{column}.path"]
                rows = file.read_row_group(group, columns=parts).to_pylist()
                is_embedded = None if has_lists else _embedded_rows(file, group, column, len(rows))
                for row, fields in enumerate(rows):
                    address = f"{posixpath.basename(path)}#{group}/{row}"
                    stored = fields.pop(column)
                    if is_embedded is None:
                        sounds = [_sound(sound, f"{address}/{n}") for n, sound in enumerate(stored or [])]
                        clip_id = None
                    else:
                        clip_id = (stored or {}).get("path") or address
                        sounds = [address if is_embedded[row] else (stored or {}).get("path")]
                    audio = [sound for sound in sounds if sound]
                    if not audio or len(audio) < len(sounds):
                        yield RejectedRow(
                            clip_id=address, reason="empty_field", detail=f"the field '{column}' is empty"
                        )
                    else:
                        fields["audio"] = audio[0]
                        yield fill_row(TableRow(fields, f"{path}#{group}/{row}", clip_id, sounds=audio), table)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(path, f"cannot be read ({error})", "give a Parquet file") from error


def _rows_about_files(file: Any, path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields conversations whose sounds are files that a column names."""
    for group in range(file.num_row_groups):
        for row, fields in enumerate(file.read_row_group(group).to_pylist()):
            yield fill_row(TableRow(fields, f"{path}#{group}/{row}"), table)


def _sound(stored: dict[str, Any] | None, address: str) -> str | None:
    """Returns the address of one of several sounds of a row, or its path where it holds no bytes."""
    path: str | None = (stored or {}).get("path")
    return address if (stored or {}).get("bytes") else path


def _embedded_rows(file: Any, group: int, column: str, rows: int) -> list[bool]:
    """Returns which rows of a group hold bytes; reads the bytes only where the file's statistics do not tell."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{column}.bytes")
    if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
        return [True] * rows
    values = file.read_row_group(group, columns=[f"{column}.bytes"]).column(0).to_pylist()
    return [bool(value and value["bytes"]) for value in values]


@dataclass
class _Sample:
    """The members of a WebDataset sample: audio by member name, its address, and the other fields."""

    key: str
    audio: dict[str, str] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields one clip per sample of a tar file.

    Consecutive members with the same name up to its first dot form a sample: an audio file, and fields from `txt`,
    `cls`, ... or `json`. Where that name has several audio files, each forms a sample with the members that have its
    name up to the last dot. Hidden members are skipped, and samples without audio rejected.

    Raises:
        UserError: the file is no uncompressed tar, a member is a link, the members of a sample are not consecutive,
            its audio is ambiguous, or its JSON is no object.
    """
    count = 0
    try:
        for group in _sample_groups(path):
            for sample in _split_sample(group, path):
                location = f"{path}: {sample.key}"
                if not sample.audio:
                    members = ", ".join(sample.texts)
                    yield RejectedRow(clip_id=location, reason="no_audio", detail=f"has no audio beside {members}")
                    continue
                count += 1
                fields, audio = _fields(sample, path), _audio_of(sample, location)
                refuse_unused_times(table, fields, location)
                fields |= {"__key__": sample.key, "audio": audio}
                yield fill_row(TableRow(fields, location, sample.key, sounds=[audio]), table)
    except (OSError, tarfile.TarError) as error:
        raise UserError(path, f"cannot be read ({error})", "give an uncompressed tar file") from error
    if not count:
        logger.warning(f"{path}: holds no sample with audio")


def _sample_groups(path: str) -> Iterator[_Sample]:
    """Yields the members of a tar file that share their name up to the first dot."""
    seen: set[str] = set()
    sample: _Sample | None = None
    with open_file(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if is_hidden(member.name) or member.isdir():
                continue
            if not member.isfile() or member.issparse():
                raise UserError(
                    f"{path}: {member.name}",
                    "is a link or no regular file",
                    "pack the files themselves: tar --dereference --hard-dereference -cf FILE.tar FOLDER",
                )
            name = posixpath.normpath(member.name)
            folder, _, file_name = name.rpartition("/")
            key = posixpath.join(folder, file_name.partition(".")[0])
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                if key in seen:
                    fault = "the members of this sample are not next to each other"
                    raise UserError(
                        f"{path}: {key}", fault, "pack the files by name: tar --sort=name -cf FILE.tar FOLDER"
                    )
                seen.add(key)
                sample = _Sample(key)
            stored = tar.extractfile(member)
            assert stored is not None, "a regular member has content"
            head = stored.read(HEAD_BYTES)
            if is_audio(name, head):
                sample.audio[name] = f"{posixpath.basename(path)}#{member.offset_data}:{member.size}"
            else:
                sample.texts[name] = head + stored.read()
        if sample is not None:
            yield sample


def _split_sample(group: _Sample, path: str) -> Iterator[_Sample]:
    """Yields the group as one sample, or one sample per audio file where names have further dots."""
    stems = {name: posixpath.splitext(name)[0] for name in [*group.audio, *group.texts]}
    audio_stems = {stems[name] for name in group.audio}
    if len(audio_stems) <= 1 and not (audio_stems and group.texts and _is_dotted(group, audio_stems, stems)):
        yield group
        return
    unmatched = [name for name in group.texts if stems[name] not in audio_stems]
    if unmatched:
        raise UserError(
            f"{path}: {group.key}",
            f"has {len(group.audio)} audio files, and {unmatched[0]} belongs to none of them",
            "name the files of a sample alike up to their last dot",
        )
    for stem in sorted(audio_stems):
        yield _Sample(
            stem,
            {name: address for name, address in group.audio.items() if stems[name] == stem},
            {name: text for name, text in group.texts.items() if stems[name] == stem},
        )


def _is_dotted(group: _Sample, audio_stems: set[str], stems: dict[str, str]) -> bool:
    """Returns whether the names of a sample with one audio file have a dot before their endings, all the same."""
    return group.key not in audio_stems and all(stems[name] in audio_stems for name in group.texts)


def _audio_of(sample: _Sample, location: str) -> str:
    """Returns the address of the audio; a video beside an audio file is not used."""
    names = [name for name in sample.audio if suffix(name) in DECODABLE_SUFFIXES] or list(sample.audio)
    if len(names) > 1:
        raise UserError(location, f"has several audio files ({', '.join(names)})", "pack one of them")
    return sample.audio[names[0]]


def _fields(sample: _Sample, path: str) -> dict[str, Any]:
    """Returns the fields of a sample by the lower-case ending of their member; `json` gives its keys."""
    fields: dict[str, Any] = {}
    for name, content in sample.texts.items():
        ending = name[len(sample.key) :].lstrip(".").lower()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            added: dict[str, Any] = {ending: content}
        else:
            added = _json_fields(text, f"{path}: {name}") if ending == "json" else {ending: text.strip()}
        for key, value in added.items():
            if key in fields and fields[key] != value:
                fault = f"field '{key}' occurs twice with different values"
                raise UserError(f"{path}: {sample.key}", fault, "remove one of them")
        fields |= added
    return fields


def _json_fields(text: str, location: str) -> dict[str, Any]:
    value = parse_json(text, location)
    if not isinstance(value, dict):
        shown = json.dumps(value)
        raise UserError(
            location, f"holds {shown[:40]}, not an object", 'store an object of fields: {"caption": "rain"}'
        )
    return value
