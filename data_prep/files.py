"""Opens what a manifest names: local paths, object stores through fsspec, and members of tar and Parquet files.

A member is written `file.tar#offset:size` or `file.parquet#group/row`; nobody but the readers of those formats writes
one, and a plain file name may hold a `#`.
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
    """Whether fsspec has to open it (`s3://`, `gs://`, ...)."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """A seekable file, read only.

    Raises:
        OSError: as the operating system or the object store says.
    """
    if not is_remote(path):
        return Path(path).open("rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(path, "rb").open())


def open_audio(path: str) -> str | BinaryIO:
    """What libsndfile can read: the path of a local file (its own reading is the fastest), else a stream.

    Raises:
        OSError: it is not there or cannot be read.
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
    """The file that holds a member, or the path itself."""
    match = _TAR_MEMBER.match(path) or _PARQUET_ROW.match(path)
    return match["file"] if match else path


def expand(pattern: str) -> list[str]:
    """The files that a pattern with `*` matches, sorted; a plain path is returned as it is.

    Raises:
        UserError: a pattern that matches nothing.
    """
    if not glob.has_magic(pattern):
        return [pattern]
    if is_remote(pattern):
        import fsspec

        filesystem, _ = fsspec.url_to_fs(pattern)
        found = [filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern)]
    else:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (patterns may be absolute)
    if not found:
        raise UserError(pattern, "matches no file", "correct `manifest`")
    return sorted(found)


def parent(path: str) -> str:
    return posixpath.dirname(path) or "."


def audio_column(names_and_types: list[tuple[str, object]]) -> str | None:
    """The column of a Parquet file that holds embedded audio (a struct with `bytes`, as Hugging Face writes it)."""
    for name, kind in names_and_types:
        if "bytes" in [field.name for field in getattr(kind, "fields", [])]:
            return name
    return None


@functools.lru_cache(maxsize=4)  # neighbouring clips lie in the same group
def _audio_of_row_group(path: str, group: int) -> list[bytes]:
    import pyarrow.parquet

    with open_file(path) as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        column = audio_column([(field.name, field.type) for field in file.schema_arrow])
        values = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    return [value["bytes"] or b"" for value in values]
