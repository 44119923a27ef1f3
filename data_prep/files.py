"""Opens the files of manifests: local paths, object stores through fsspec, and members of tar and Parquet files.

A member is addressed as `file.tar#offset:size` or `file.parquet#group/row`. The readers of these formats create such
addresses; a plain file name may contain a `#`.
"""

from __future__ import annotations

import functools
import glob
import io
import posixpath
import re
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.core.errors import UserError

_TAR_MEMBER = re.compile(r"(?P<file>.+\.tar)#(?P<offset>\d+):(?P<size>\d+)$")
_PARQUET_ROW = re.compile(r"(?P<file>.+\.parquet)#(?P<group>\d+)/(?P<row>\d+)$")


def is_remote(path: str) -> bool:
    """Returns whether the path is a URL that fsspec opens (`s3://`, `gs://`, ...)."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Opens a seekable binary file for reading.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    if not is_remote(path):
        return Path(path).open("rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(path, "rb").open())


def open_audio(path: str) -> str | BinaryIO:
    """Returns what libsndfile can read: the path of a local file (which it reads fastest itself), otherwise a stream.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    if match := _TAR_MEMBER.match(path):
        with open_file(match["file"]) as tar:
            tar.seek(int(match["offset"]))
            return io.BytesIO(tar.read(int(match["size"])))
    if match := _PARQUET_ROW.match(path):
        return io.BytesIO(_audio_of_row_group(match["file"], int(match["group"]))[int(match["row"])])
    file = open_file(path)
    if is_remote(path):
        return file
    file.close()
    return path


def container(path: str) -> str:
    """Returns the file that contains a member, or the path itself."""
    match = _TAR_MEMBER.match(path) or _PARQUET_ROW.match(path)
    return match["file"] if match else path


def expand(pattern: str) -> list[str]:
    """Returns the sorted files that match a pattern with `*`; a plain path is returned unchanged.

    Raises:
        UserError: nothing matches the pattern.
    """
    if not glob.has_magic(pattern):
        return [pattern]
    if is_remote(pattern):
        import fsspec

        filesystem, _ = fsspec.url_to_fs(pattern)
        matches = [filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern)]
    else:
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 (patterns may be absolute)
    if not matches:
        raise UserError(pattern, "matches no file", "correct `manifest`")
    return sorted(matches)


def parent(path: str) -> str:
    """Returns the folder of a path or URL."""
    return posixpath.dirname(path) or "."


def audio_column(names_and_types: list[tuple[str, object]]) -> str | None:
    """Returns the column of a Parquet file with embedded audio (a struct with `bytes`, as Hugging Face writes it)."""
    for name, kind in names_and_types:
        if "bytes" in [field.name for field in getattr(kind, "fields", [])]:
            return name
    return None


@functools.lru_cache(maxsize=4)  # consecutive clips are in the same row group
def _audio_of_row_group(path: str, group: int) -> list[bytes]:
    import pyarrow.parquet

    with open_file(path) as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        column = audio_column([(field.name, field.type) for field in file.schema_arrow])
        values = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    return [value["bytes"] or b"" for value in values]
