"""Opens the files of manifests: local paths, object stores through fsspec, and members of tar and Parquet files.

A member is addressed as `file.tar#offset:size` or `file.parquet#group/row`, and one of several sounds of a row as
`file.parquet#group/row/n`. The readers of these formats create such addresses; a plain file name may contain a `#`.
"""

from __future__ import annotations

import codecs
import errno
import functools
import glob
import io
import json
import posixpath
import re
import stat
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.core.errors import UserError

_TAR_MEMBER = re.compile(r"(?P<file>.+\.tar)#(?P<offset>\d+):(?P<size>\d+)$")
_BYTE_ORDER_MARKS = [  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]
_PARQUET_ROW = re.compile(r"(?P<file>.+\.parquet)#(?P<group>\d+)/(?P<row>\d+)(?:/(?P<sound>\d+))?$")


def is_remote(path: str) -> bool:
    """Returns whether the path is a URL that fsspec opens (`s3://`, `gs://`, ...)."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Opens a seekable binary file for reading.

    Raises:
        OSError: the file is missing, cannot be read, or is a named pipe or a device, which could block for ever.
    """
    if not is_remote(path):
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
            raise OSError(errno.EINVAL, f"is {kind}, not a file", path)
        return Path(path).open("rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(path, "rb").open())


def open_utf8(path: str) -> BinaryIO:
    """Opens a text file as UTF-8 without a byte-order mark; converts files whose mark names another encoding.

    Raises:
        OSError: the file is missing or cannot be read.
        UnicodeDecodeError: the file is not in the encoding that its mark names.
    """
    with open_file(path) as stream:
        start = stream.read(4)
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if start.startswith(mark)), None)
    if encoding is None:
        return open_file(path)
    converted = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with io.TextIOWrapper(open_file(path), encoding=encoding, newline="") as text:
        while block := text.read(1 << 20):
            converted.write(block.encode())
    converted.seek(0)
    return cast(BinaryIO, converted)


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
        sounds = _audio_of_row_group(match["file"], int(match["group"]))[int(match["row"])]
        return io.BytesIO(sounds[int(match["sound"] or 0)])
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


def audio_column(schema: Any, path: str) -> str:
    """Returns the column of a Parquet file with embedded audio: a struct with `bytes`, as Hugging Face writes it, or a
    list of them.

    Raises:
        UserError: there is no such column, or there are several; names the file.
    """
    columns = audio_columns(schema)
    if not columns:
        raise UserError(path, "has no column of embedded audio", "give a file of the Hugging Face audio layout")
    if len(columns) > 1:
        raise UserError(path, f"has several columns of audio ({', '.join(columns)})", "give a file with one of them")
    return columns[0]


def audio_columns(schema: Any) -> list[str]:
    """Returns the columns of a Parquet file with embedded audio."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return [
        column.name
        for column in schema
        if _holds_bytes(column.type) and _kind(features.get(column.name, {})) in (None, "Audio")
    ]


def _holds_bytes(kind: Any) -> bool:
    fields = getattr(getattr(kind, "value_type", kind), "fields", [])
    return "bytes" in [field.name for field in fields]


def _kind(feature: Any) -> str | None:
    """Returns the type that Hugging Face's metadata states for a column, or for the entries of its lists."""
    if isinstance(feature, list):
        feature = feature[0] if feature else {}
    while isinstance(feature, dict) and feature.get("_type") in ("List", "Sequence", "LargeList"):
        feature = feature.get("feature", {})
    kind: str | None = feature.get("_type") if isinstance(feature, dict) else None
    return kind


@functools.lru_cache(maxsize=4)  # consecutive clips are in the same row group
def _audio_of_row_group(path: str, group: int) -> list[list[bytes]]:
    """Returns the sounds of each row, of which there is one in a column that holds no lists."""
    import pyarrow.parquet

    with open_file(path) as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        column = audio_column(file.schema_arrow, path)
        values = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    rows = [value if isinstance(value, list) else [value] for value in values]
    return [[(sound or {}).get("bytes") or b"" for sound in row] for row in rows]
