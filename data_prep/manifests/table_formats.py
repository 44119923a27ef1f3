"""Reads tables: CSV and TSV, and a folder per class.

The templates of `TableConfig` make the clip, the question and the answers from the fields of a row.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_prep.audio.containers import AUDIO_SUFFIXES, HEAD_BYTES, is_audio, is_hidden
from data_prep.config import TableConfig
from data_prep.files import open_utf8
from data_prep.manifests.clips import RejectedRow
from data_prep.manifests.rows import ClipRow
from data_prep.manifests.table_rows import fill_row
from data_prep.manifests.templates import TableRow, refuse_unused_times
from pipeline.core.console import logger
from pipeline.core.errors import UserError

# Published tables that need no templates: the columns that identify them, and the templates they imply.
KNOWN_TABLES: list[tuple[set[str], dict[str, Any]]] = [
    ({"file_name", *(f"caption_{i}" for i in range(1, 6))},  # Clotho
     {"audio": "{file_name}", "answers": [f"{{caption_{i}}}" for i in range(1, 6)]}),
    # Its files are cut already: `start_time` is that of the video on YouTube.
    ({"youtube_id", "start_time", "caption"}, {"audio": "{youtube_id}.wav", "answers": ["{caption}"]}),  # AudioCaps
    ({"filename", "fold", "target", "category"}, {"audio": "{filename}", "answers": ["{category}"]}),  # ESC-50
]  # fmt: skip
SPLITS = {"train", "test", "val", "valid", "validation", "dev", "eval", "training", "testing"}


def read_csv(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields the rows of a CSV or TSV file with a header; lines without any text are skipped.

    The delimiter is a comma; a tab or a semicolon in files whose header has no comma; a tab in `.tsv`.

    Raises:
        UserError: the file is not text in UTF-8 or in an encoding with a byte-order mark, has no header, a column
            twice, or a line with more or fewer fields than the header.
    """
    try:
        with io.TextIOWrapper(open_utf8(path), encoding="utf-8", newline="") as text:
            rows = _csv_rows(text, path)
            columns = [column.strip() for column in next(rows, (0, []))[1]]
            if not columns:
                raise UserError(path, "has no header", "begin it with a line of column names, such as audio,caption")
            repeated = [name for name, count in Counter(columns).items() if count > 1 and name]
            if repeated:
                raise UserError(f"{path}:1", f"column '{repeated[0]}' occurs twice", "rename one of them")
            templates = _known_table(table, columns)
            if templates is table:
                refuse_unused_times(table, columns, path)
            for line, cells in rows:
                if len(cells) != len(columns):
                    fault = f"has {len(cells)} fields, the header has {len(columns)}"
                    remedy = "put text that holds the delimiter or a line break in double quotes"
                    raise UserError(f"{path}:{line}", fault, f'{remedy}: "a dog barks, then a car passes"')
                yield fill_row(TableRow(dict(zip(columns, cells, strict=True)), f"{path}:{line}"), templates)
    except UnicodeDecodeError as error:
        remedy = "convert it, for example from Windows: iconv -f WINDOWS-1252 -t UTF-8 FILE.csv > NEW.csv"
        raise UserError(path, f"is not UTF-8 ({error})", remedy) from error
    except OSError as error:
        raise UserError(path, f"cannot be read ({error})", "give a CSV file with a header") from error


def _csv_rows(text: TextIO, path: str) -> Iterator[tuple[int, list[str]]]:
    """Yields each row that holds any text, the header first, with the number of its last line."""
    header = text.readline()
    text.seek(0)
    delimiter = _delimiter(header, prefers_tab=path.lower().endswith((".tsv", ".tab")))
    spaced = f"{delimiter} " in header and header.count(delimiter) == header.count(f"{delimiter} ")
    reader = csv.reader(text, strict=True, delimiter=delimiter, skipinitialspace=spaced)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        remedy = 'put text that begins with a quote in quotes, and double its own: """Hello"" he said"'
        raise UserError(f"{path}:{reader.line_num}", f"bad CSV ({error})", remedy) from error


def _delimiter(header: str, *, prefers_tab: bool) -> str:
    order = "\t,;" if prefers_tab else ",\t;"
    return next((delimiter for delimiter in order if delimiter in header), order[0])


def read_folder(path: str, table: TableConfig) -> Iterator[ClipRow | RejectedRow]:
    """Yields the clips of `<class>/<file>`, deeper ones too; the fields are `class` and `audio`.

    All classes are the choices. Audio is recognised by its ending or its first bytes. Hidden files and folders are
    skipped; audio outside the classes is rejected; other files are counted in a warning.

    Raises:
        UserError: the folders are named like splits (train, test), not like classes.
    """
    root = Path(path)
    table = table if "answers" in table.model_fields_set else table.model_copy(update={"answers": ["{class}"]})
    others: list[str] = []
    files = {
        entry.name: _audio_files(root, entry, others, {root.resolve()})
        for entry in sorted(root.iterdir())
        if entry.is_dir() and not is_hidden(entry.name)
    }
    classes = [name for name, names in files.items() if names]
    if classes and {name.lower() for name in classes} <= SPLITS:
        fault = f"has folders named like splits ({', '.join(classes)}), not like classes"
        raise UserError(path, fault, f"give one split as the manifest: {path.rstrip('/')}/{classes[0]}")
    for entry in sorted(root.iterdir()):
        if not entry.is_dir() and not is_hidden(entry.name) and _is_audio(entry):
            yield RejectedRow(clip_id=entry.name, reason="no_class", detail="lies in no class folder", audio=entry.name)
    for name in classes:
        for audio in files[name]:
            yield fill_row(TableRow({"audio": audio, "class": name}, f"{path}: {audio}", audio, classes), table)
    if others:
        logger.warning(f"{path}: left out {len(others)} files that are not audio, for example {others[0]}")


def _audio_files(root: Path, folder: Path, others: list[str], seen: set[Path]) -> list[str]:
    """Returns the audio files below a folder, relative to the root; adds the other files to `others`."""
    real = folder.resolve()
    if real in seen:  # a link to a folder above
        return []
    names: list[str] = []
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry.name):
            continue
        if entry.is_dir() and entry.suffix.lower() not in AUDIO_SUFFIXES:
            names += _audio_files(root, entry, others, seen | {real})
        else:
            (names if _is_audio(entry) else others).append(entry.relative_to(root).as_posix())
    return names


def _is_audio(file: Path) -> bool:
    """Returns whether a file is audio; reads its first bytes only if it is a regular file."""
    if not file.is_file():
        return is_audio(file.name, b"")
    with file.open("rb") as stream:
        return is_audio(file.name, stream.read(HEAD_BYTES))


def _known_table(table: TableConfig, columns: Sequence[str]) -> TableConfig:
    for required_columns, values in KNOWN_TABLES:
        if required_columns <= set(columns) and "answers" not in table.model_fields_set:
            return table.model_copy(update=values)
    return table
