"""Rows that a model cannot learn from, in every input format: each is rejected by its id and a reason, and the rows
beside it are trained on as they are."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.core.errors import UserError
from tests.helpers.corpora import prepare_config, prepare_here
from tests.roundtrip.training_view import difference, expected, inspect, seen_by_model
from tests.roundtrip.truth import Truth, make_truth, write_sounds
from tests.roundtrip.writers import wav

UNREADABLE: dict[str, dict[str, Any]] = {
    "missing file": {"audio": "gone.wav"},
    "outside": {"audio": "../../etc/passwd"},
}
FAULTS = UNREADABLE | {
    "empty question": {"question": ""},
    "blank question": {"question": " \n\t"},
    "empty answer": {"answer": ""},
    "blank answer": {"answer": "\u00a0 "},
    "no audio path": {"audio": ""},
}
NULLS: dict[str, dict[str, Any]] = {
    "null question": {"question": None},
    "null answer": {"answer": None},
    "NaN answer": {"answer": float("nan")},
}


def table_rows(truth: Truth) -> list[dict[str, Any]]:
    return [
        {"audio": truth.sounds[item.sound].file, "question": item.question, "answer": item.answer}
        for item in truth.items
    ]


def write_jsonl(truth: Truth, folder: Path, faulty: dict[str, dict[str, Any]]) -> None:
    rows = [
        {"clip_id": f"row{number}", "audio": row["audio"], "questions": [{k: row[k] for k in ("question", "answer")}]}
        for number, row in enumerate(with_faults(truth, faulty))
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_openaqa(truth: Truth, folder: Path, faulty: dict[str, dict[str, Any]]) -> None:
    rows = [
        {
            "instruction": row["question"],
            "audio_id": row["audio"],
            "output": row["answer"],
            "dataset": "unspecified",
            "task": "unspecified",
        }
        for row in with_faults(truth, faulty)
    ]
    (folder / "m.json").write_text(json.dumps(rows))


def write_csv(truth: Truth, folder: Path, faulty: dict[str, dict[str, Any]]) -> None:
    with (folder / "m.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["audio", "question", "answer"])
        writer.writeheader()
        writer.writerows(with_faults(truth, faulty))


def write_parquet(truth: Truth, folder: Path, faulty: dict[str, dict[str, Any]]) -> None:
    sounds = {sound.file: wav(sound) for sound in truth.sounds}
    rows = [
        {
            "sound": {"bytes": sounds.get(row["audio"]), "path": row["audio"]},
            **{key: row[key] if isinstance(row[key], str) else None for key in ("question", "answer")},
        }
        for row in with_faults(truth, faulty)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "m.parquet")


def write_webdataset(truth: Truth, folder: Path, faulty: dict[str, dict[str, Any]]) -> None:
    sounds = {sound.file: wav(sound) for sound in truth.sounds}
    with tarfile.open(folder / "m.tar", "w") as tar:
        for number, row in enumerate(with_faults(truth, faulty)):
            fields = {key: row[key] for key in ("question", "answer")}
            members = {"json": json.dumps(fields).encode()}
            if row["audio"]:
                members["wav"] = sounds.get(row["audio"], b"no audio at all")
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@dataclass(frozen=True)
class Format:
    write: Callable[[Truth, Path, dict[str, dict[str, Any]]], None]
    manifest: str
    faults: dict[str, dict[str, Any]]
    table: bool = True


FORMATS = {
    "jsonl": Format(write_jsonl, "m.jsonl", UNREADABLE, table=False),
    "openaqa": Format(write_openaqa, "m.json", UNREADABLE, table=False),
    "csv": Format(write_csv, "m.csv", FAULTS),
    "parquet": Format(write_parquet, "m.parquet", FAULTS | NULLS),
    "webdataset": Format(write_webdataset, "m.tar", FAULTS | NULLS),
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, form in FORMATS.items() for fault in form.faults])
def test_a_faulty_row_is_rejected_and_the_others_are_trained_on(name: str, fault: str, tmp_path: Path) -> None:
    truth = make_truth(5, items=6)
    folder, features, form = tmp_path / "corpus", tmp_path / "features", FORMATS[name]
    folder.mkdir()
    write_sounds(truth, folder)
    form.write(truth, folder, {fault: form.faults[fault]})
    table = {"question": "{question}"} if form.table else {}
    prepare_here(prepare_config(folder / form.manifest, features, table=table, max_reject_fraction=0.5))
    rejects = [json.loads(line) for line in (features / "rejects.jsonl").read_text().splitlines()]
    seen = seen_by_model(inspect(tmp_path, features), features, truth.sounds)
    wanted = expected(truth.only(dataset="unspecified", domain="unspecified", task="unspecified"))
    assert not difference(seen, wanted), difference(seen, wanted)
    assert len(rejects) == 1 and rejects[0]["clip_id"] and rejects[0]["reason"] and rejects[0]["detail"]


def with_faults(truth: Truth, faulty: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a table with faulty ones between them, about a sound of their own."""
    rows = table_rows(truth)
    extra = {"audio": truth.sounds[0].file, "question": "Is it faulty?", "answer": "yes"}
    rows[3:3] = [{**extra, **fault} for fault in faulty.values()]
    return rows


@pytest.mark.parametrize("escape", [r"\ud83d", r"\udc00 "])
def test_half_of_a_character_is_an_error_that_names_the_row(escape: str, tmp_path: Path) -> None:
    row = '{"clip_id": "a", "audio": "a.wav", "questions": [{"question": "q%s", "answer": "b"}]}'
    (tmp_path / "m.jsonl").write_text(f"{row % ''}\n{row % escape}\n")
    with pytest.raises(UserError, match=r"m\.jsonl:2: .*character"):
        prepare_here(prepare_config(tmp_path / "m.jsonl", tmp_path / "features"))
