"""Tests Parquet and tar files as people have them: every member is read, or named with the reason."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data_prep.test_manifest_formats import wav_bytes
from tests.data_prep.test_table_formats import fault, read

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = {"question": "What is heard?", "answers": ["{txt}"]}
WAV = wav_bytes(500)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path: Path, audio: list, captions: list, **columns) -> Path:
    table = pa.table({"audio": pa.array(audio, AUDIO), "caption": captions, **columns})
    pyarrow.parquet.write_table(table, path)
    return path


def embedded(count: int) -> list[dict]:
    return [{"bytes": wav_bytes(300 + 100 * i), "path": f"{i}.wav"} for i in range(count)]


@pytest.mark.parametrize("captions", [["rain", None], [1.5, float("nan")], ["rain", " "]], ids=["null", "nan", "blank"])
def test_a_row_without_a_caption_is_rejected(tmp_path, captions):
    clips, rejects = read(write_parquet(tmp_path / "m.parquet", embedded(2), captions))
    assert clips == {"0.wav": [str(captions[0])]}
    assert rejects == {f"{tmp_path}/m.parquet#0/1": ("empty_field", "the field 'caption' is empty")}


@pytest.mark.parametrize(
    ("captions", "entry"), [([["rain", "wind"]], "{caption[0]}"), ([{"en": "rain"}], "{caption[en]}")]
)
def test_a_list_or_an_object_is_no_text_but_its_entries_are(tmp_path, captions, entry):
    manifest = write_parquet(tmp_path / "m.parquet", embedded(1), captions)
    assert entry in fault(manifest)
    assert read(manifest, {"question": "What?", "answers": [entry]})[0] == {"0.wav": ["rain"]}


def test_audio_of_a_row_is_its_bytes_or_else_its_path(tmp_path):
    audio = [None, {"bytes": None, "path": "a.wav"}, {"bytes": None, "path": None}, {"bytes": WAV, "path": None}]
    clips, rejects = read(write_parquet(tmp_path / "m.parquet", audio, list("abcd")))
    assert clips == {"a.wav": ["b"], "m.parquet#0/3": ["d"]}
    assert rejects == dict.fromkeys(("m.parquet#0/0", "m.parquet#0/2"), ("empty_field", "the field 'audio' is empty"))


def test_a_second_column_of_audio_is_not_dropped(tmp_path):
    manifest = write_parquet(tmp_path / "m.parquet", embedded(1), ["rain"], music=pa.array(embedded(1), AUDIO))
    assert "several columns of audio (audio, music)" in fault(manifest)


def test_a_column_of_images_is_not_audio(tmp_path):
    features = b'{"info": {"features": {"image": {"_type": "Image"}, "sound": {"_type": "Audio"}}}}'
    columns = {"image": pa.array([{"bytes": b"png", "path": "i.png"}], AUDIO), "sound": pa.array(embedded(1), AUDIO)}
    table = pa.table({**columns, "caption": ["rain"]}).replace_schema_metadata({"huggingface": features})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet")[0] == {"0.wav": ["rain"]}


@pytest.mark.parametrize("content", [b'["rain"]', b"3", b'"rain"'])
def test_json_of_a_sample_is_an_object(tmp_path, content):
    message = fault(write_tar(tmp_path / "m.tar", [("a.wav", WAV), ("a.json", content)]))
    assert "a.json" in message and "not an object" in message


@pytest.mark.parametrize(
    ("members", "clips"),
    [
        ([("a.json", b'{"txt": "rain", "audio": "x.wav"}'), ("a.wav", WAV)], {"a": ["rain"]}),
        ([("a.wav", WAV), ("a.json", b'{"txt": "rain", "audio": "x.wav"}')], {"a": ["rain"]}),
        ([("a.WAV", WAV), ("a.TXT", "\ufeffrain".encode())], {"a": ["rain"]}),
        ([("a.bin", WAV), ("a.txt", b"rain")], {"a": ["rain"]}),
        ([("a.m4a", b"\0\0\0\x1cftypM4A "), ("a.txt", b"rain")], {"a": ["rain"]}),
        ([("a.wav", WAV), ("a.mp4", b"\0\0\0\x1cftypmp42"), ("a.txt", b"rain")], {"a": ["rain"]}),
        ([("a.wav", WAV), ("a.txt", b"MAC addresses aloud"), ("a.npy", b"\x93")], {"a": ["MAC addresses aloud"]}),
        (
            [("1.0 x.wav", WAV), ("1.0 x.txt", b"rain"), ("1.5 x.wav", wav_bytes(700)), ("1.5 x.txt", b"wind")],
            {"1.0 x": ["rain"], "1.5 x": ["wind"]},
        ),
        ([("1.0 x.wav", WAV), ("1.0 x.txt", b"rain")], {"1.0 x": ["rain"]}),
        (
            [("./._a.wav", b"\0\5\26\7"), ("./a.wav", WAV), ("./a.txt", b"rain"), ("__MACOSX/b.wav", WAV)],
            {"a": ["rain"]},
        ),
    ],
    ids=[
        "json before",
        "json after",
        "upper case",
        "other ending",
        "m4a",
        "video",
        "text",
        "dots",
        "dots alone",
        "hidden",
    ],
)
def test_samples_are_read_as_they_were_packed(tmp_path, members, clips):
    assert read(write_tar(tmp_path / "m.tar", members), TEXT) == (clips, {})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", b"{}"), ("b.json", b"{}"), ("a.wav", WAV)], "not next to each other"),
        ([("a.wav", WAV), ("a.flac", WAV), ("a.txt", b"rain")], "several audio files (a.wav, a.flac)"),
        ([("a.left.wav", WAV), ("a.right.wav", WAV), ("a.txt", b"rain")], "a.txt belongs to none of them"),
        ([("a.wav", WAV), ("a.txt", b"rain"), ("a.json", b'{"txt": "wind"}')], "'txt' occurs twice"),
        ([("a.wav", WAV), ("a.txt", "café".encode("cp1252"))], "'txt' is not UTF-8"),
    ],
    ids=["apart", "two files", "two channels", "two texts", "encoding"],
)
def test_an_ambiguous_sample_is_an_error(tmp_path, members, message):
    assert message in fault(write_tar(tmp_path / "m.tar", members), TEXT)


def test_a_link_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        link = tarfile.TarInfo("a.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "b.wav"
        tar.addfile(link)
    assert "a.wav: is a link" in fault(tmp_path / "m.tar", TEXT)


def test_samples_without_audio_are_rejected(tmp_path):
    members = [("README.md", b"tones"), ("a.wav", WAV), ("a.txt", b"rain"), ("b.txt", b"wind")]
    clips, rejects = read(write_tar(tmp_path / "m.tar", members), TEXT)
    assert clips == {"a": ["rain"]}
    assert rejects == {
        f"{tmp_path}/m.tar: README": ("no_audio", "has no audio beside README.md"),
        f"{tmp_path}/m.tar: b": ("no_audio", "has no audio beside b.txt"),
    }
