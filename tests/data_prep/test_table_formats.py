"""Tests tables as people have them: no cell is cut, moved or invented, and no row is lost without a reason."""

import os
from pathlib import Path

import pytest

from data_prep.manifests.clips import Clip, RejectedRow
from data_prep.manifests.reader import manifest_sha256, read_clips
from pipeline.core.errors import UserError
from tests.data_prep.test_manifest_formats import wav_bytes
from tests.helpers.corpora import prepare_config

CAPTION = {"question": "What is heard?", "answers": ["{caption}"]}
CLASS = {"question": "Which sound?"}


def read(manifest: Path, table: dict | None = None) -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """Returns the answers of each clip, and the reason and detail of each rejected row."""
    config = prepare_config(manifest, manifest.parent / "out", table=table or CAPTION)
    rows = list(read_clips(config))
    clips = {row.clip_id: [question.answer for question in row.questions] for row in rows if isinstance(row, Clip)}
    return clips, {row.clip_id: (row.reason, row.detail) for row in rows if isinstance(row, RejectedRow)}


def fault(manifest: Path, table: dict | None = None) -> str:
    with pytest.raises(UserError) as error:
        read(manifest, table)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "line", "count"),
    [
        ("audio,caption\na.wav,rain\nb.wav,a dog barks, then a car passes\n", 3, 3),
        ("audiocap_id,youtube_id,start_time,caption\n1,a,30,a dog barks, then a car\n", 2, 5),
        ("audio,caption,split\na.wav,rain\n", 2, 2),
        ("audio,caption\na.wav,an engine runs\nand stops\n", 3, 1),
    ],
    ids=["more", "known table", "fewer", "line break"],
)
def test_a_line_with_another_number_of_fields_is_an_error(tmp_path, text, line, count):
    message = fault(write(tmp_path / "m.csv", text))
    assert f"m.csv:{line}: has {count} fields" in message and "double quotes" in message


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("m.csv", "audio,caption\na.wav,café\n", "utf-8-sig"),
        ("m.csv", "audio,caption\r\na.wav,café\r\n", "utf-16"),
        ("m.csv", "audio;caption\na.wav;café\n", "utf-8"),
        ("m.csv", "audio\tcaption\na.wav\tcafé\n", "utf-8"),
        ("m.tsv", "audio\tcaption\na.wav\tcafé\n", "utf-8"),
        ("m.csv", "audio, caption\na.wav, café\n", "utf-8"),
        ("m.csv", "\naudio,caption\n\na.wav,café\n,\n", "utf-8"),
    ],
    ids=["byte-order mark", "utf-16", "semicolons", "tabs", "tsv", "spaces", "blank lines"],
)
def test_tables_are_read_as_spreadsheets_save_them(tmp_path, name, text, encoding):
    assert read(write(tmp_path / name, text, encoding)) == ({"a.wav": ["café"]}, {})


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("audio,caption\na.wav,café\n", "cp1252", "iconv"),
        ("audio,caption,caption\na.wav,rain,wind\n", "utf-8", "column 'caption' occurs twice"),
        ('audio,caption\na.wav,"Hello" he said\n', "utf-8", "m.csv:2: bad CSV"),
        ("", "utf-8", "has no header"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_a_remedy(tmp_path, text, encoding, message):
    assert message in fault(write(tmp_path / "m.csv", text, encoding))


def test_quotes_and_line_breaks_in_quotes_are_text(tmp_path):
    text = 'audio,caption\na.wav,a 12" record\nb.wav,"he said ""go"",\nand left"\n'
    assert read(write(tmp_path / "m.csv", text))[0] == {"a.wav": ['a 12" record'], "b.wav": ['he said "go",\nand left']}


def test_a_row_with_an_empty_field_is_rejected(tmp_path):
    clips, rejects = read(write(tmp_path / "m.csv", "audio,caption\na.wav,rain\nb.wav,\nc.wav,  \n"))
    assert clips == {"a.wav": ["rain"]}
    expected = ("empty_field", "the field 'caption' is empty")
    assert rejects == {f"{tmp_path}/m.csv:3": expected, f"{tmp_path}/m.csv:4": expected}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_named_pipe_is_no_manifest(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "named pipe" in fault(tmp_path / name)


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Two classes with what systems, notebooks and downloaders leave beside their audio."""
    audio = wav_bytes(500)
    files = {
        "dog/1.wav": audio,
        "dog/._1.wav": b"\0\5\26\7",
        "dog/1.info.json": b"{}",
        "dog/1.description": b"A dog.",
        "dog/2.wav.part": audio,
        "dog/no ending": audio,
        "cat/deep/er/1.m4a": b"\0\0\0\x1cftypM4A ",
        ".ipynb_checkpoints/1.wav": audio,
        "__MACOSX/dog/1.wav": audio,
        "notes/read me.txt": b"ID3 tags are removed.",
        "stray.wav": audio,
    }
    for name, content in files.items():
        (tmp_path / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sounds" / name).write_bytes(content)
    (tmp_path / "sounds/empty").mkdir()
    (tmp_path / "sounds/dog/loop").symlink_to("..")
    return tmp_path / "sounds"


def test_classes_are_the_folders_with_audio(sounds):
    clips, rejects = read(sounds, CLASS)
    assert clips == {"cat/deep/er/1.m4a": ["cat"], "dog/1.wav": ["dog"], "dog/no ending": ["dog"]}
    assert rejects == {"stray.wav": ("no_class", "lies in no class folder")}
    config = prepare_config(sounds, sounds.parent / "out", table=CLASS)
    choices = {tuple(clip.questions[0].choices or ()) for clip in read_clips(config) if isinstance(clip, Clip)}
    assert choices == {("cat", "dog")}


def test_files_that_are_not_audio_are_counted(sounds, caplog):
    read(sounds, CLASS)
    assert "left out 4 files that are not audio" in caplog.text


def test_deeper_files_are_part_of_the_manifest(sounds):
    config = prepare_config(sounds, sounds.parent / "out", table=CLASS)
    old = manifest_sha256(config)
    (sounds / "cat/deep/er/2.wav").write_bytes(wav_bytes(500))
    assert manifest_sha256(config) != old


def test_folders_named_like_splits_are_no_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split / "dog").mkdir(parents=True)
        (tmp_path / "data" / split / "dog/1.wav").write_bytes(wav_bytes(500))
    assert "named like splits" in fault(tmp_path / "data", CLASS)
    assert read(tmp_path / "data/train", CLASS)[0] == {"dog/1.wav": ["dog"]}
