"""Reads manifests that hold no questions: CSV, a folder per class, Parquet and WebDataset with embedded audio.

The templates of `TableConfig` make the clip, the question and the answers from the fields of a row.
"""

from __future__ import annotations

import csv
import io
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import TableConfig
from data_prep.files import audio_column, open_file
from data_prep.manifests.rows import ClipRow, QuestionRow, group_by_clip, missing_field, parse_json
from pipeline.core.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
# Published tables that need no templates: the columns that identify them, and the templates they imply.
KNOWN_TABLES: list[tuple[set[str], dict[str, Any]]] = [
    ({"file_name", *(f"caption_{i}" for i in range(1, 6))},  # Clotho
     {"audio": "{file_name}", "answers": [f"{{caption_{i}}}" for i in range(1, 6)]}),
    ({"youtube_id", "start_time", "caption"}, {"audio": "{youtube_id}.wav", "answers": ["{caption}"]}),  # AudioCaps
    ({"filename", "fold", "target", "category"}, {"audio": "{filename}", "answers": ["{category}"]}),  # ESC-50
]  # fmt: skip


def read_csv(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the clips of a CSV file with a header; rows of the same clip are joined."""

    def rows() -> Iterator[ClipRow]:
        try:
            with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as text:
                reader = csv.DictReader(text, strict=True)
                templates = _known_table(table, reader.fieldnames or [])
                for fields in reader:
                    yield _clip(
                        {k: v for k, v in fields.items() if v is not None}, templates, f"{path}:{reader.line_num}"
                    )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(path, f"cannot be read ({error})", "give a UTF-8 CSV file with a header") from error

    return group_by_clip(rows())


def read_folder(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the clips of `<class>/<file>`; the fields are `class` and `audio`, and all classes are the choices."""
    root = Path(path)
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    for name in classes:
        for file in sorted((root / name).iterdir()):
            if file.suffix.lower() in AUDIO_SUFFIXES:
                audio = f"{name}/{file.name}"
                yield _clip(
                    {"audio": audio, "class": name}, _with_default_answer(table, "{class}"), path, audio, classes
                )


def read_parquet(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields the rows of a Hugging Face dataset with embedded audio; the other columns are the fields."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            column = audio_column([(field.name, field.type) for field in file.schema_arrow])
            if column is None:
                raise UserError(path, "has no column of embedded audio", "give a file of the Hugging Face audio layout")
            field_columns = [field.name for field in file.schema_arrow if field.name != column]
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=[*field_columns, f"{column}.path"]).to_pylist()
                for row, fields in enumerate(rows):
                    audio = f"{posixpath.basename(path)}#{group}/{row}"
                    clip_id = (fields.pop(column) or {}).get("path") or audio
                    yield _clip({**fields, "audio": audio}, table, f"{path}#{group}/{row}", clip_id)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(path, f"cannot be read ({error})", "give a Parquet file") from error


def read_webdataset(path: str, table: TableConfig) -> Iterator[ClipRow]:
    """Yields one clip per key of a tar file.

    Consecutive members with the same key form a clip: an audio file, and fields from `txt`, `cls`, ... or `json`.
    """
    try:
        with open_file(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            key, fields = "", dict[str, Any]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if f"{folder}/{stem}" != key:
                    if "audio" in fields:
                        yield _clip(fields, table, f"{path}: {key.lstrip('/')}", fields["__key__"])
                    key, fields = f"{folder}/{stem}", {"__key__": f"{folder}/{stem}".lstrip("/")}
                if f".{suffix.lower()}" in AUDIO_SUFFIXES:
                    fields["audio"] = f"{posixpath.basename(path)}#{member.offset_data}:{member.size}"
                    continue
                content = tar.extractfile(member)
                text = content.read().decode(errors="replace") if content else ""
                fields |= parse_json(text, f"{path}: {member.name}") if suffix == "json" else {suffix: text.strip()}
            if "audio" in fields:
                yield _clip(fields, table, f"{path}: {key.lstrip('/')}", fields["__key__"])
    except (OSError, tarfile.TarError) as error:
        raise UserError(path, f"cannot be read ({error})", "give an uncompressed tar file") from error


def _known_table(table: TableConfig, columns: Any) -> TableConfig:
    for required_columns, values in KNOWN_TABLES:
        if required_columns <= set(columns) and "answers" not in table.model_fields_set:
            return table.model_copy(update=values)
    return table


def _with_default_answer(table: TableConfig, answer: str) -> TableConfig:
    return table if "answers" in table.model_fields_set else table.model_copy(update={"answers": [answer]})


def _clip(
    fields: dict[str, Any],
    table: TableConfig,
    location: str,
    clip_id: str | None = None,
    choices: list[str] | None = None,
) -> ClipRow:
    if table.question is None:
        raise UserError(
            "table.question", f"is not set, and {location} has no question", "give the question of all rows"
        )

    def fill(template: str) -> str:
        try:
            return template.format_map(fields)
        except (KeyError, IndexError, AttributeError) as error:
            raise missing_field(location, str(error.args[0])) from error

    audio = fill(table.audio)
    return ClipRow(
        clip_id=fill(table.clip_id) if table.clip_id else clip_id or audio,
        audio=audio,
        dataset=fill(table.dataset),
        domain=fill(table.domain),
        questions=[
            QuestionRow(question=fill(table.question), answer=fill(answer), task=fill(table.task), choices=choices)
            for answer in table.answers
        ],
    )
