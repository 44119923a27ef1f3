"""Tests every input format besides our own: clips, questions, and where their audio is."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

from data_prep.audio.decode import AudioFile
from data_prep.manifests.json_formats import json_records
from data_prep.manifests.reader import audio_path, audio_roots, read_clips
from pipeline.core.errors import UserError
from tests.helpers.corpora import prepare_config, tone


def read(manifest, table=None, **values):
    config = prepare_config(manifest, manifest.parent / "out", table=table or {}, **values)
    return [
        (clip.clip_id, clip.audio, [(q.question, q.answer) for q in clip.questions], clip)
        for clip in read_clips(config)
    ]


def wav_bytes(frequency_hz: float, rate_hz: int = 8000, format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.3, rate_hz, frequency_hz), rate_hz, format=format)
    return buffer.getvalue()


def check_audio(manifest, frequencies_hz, **values) -> None:
    """Checks that the audio of the clips, opened as preparation does, has these pitches."""
    config = prepare_config(manifest, manifest.parent / "out", **values)
    for clip, frequency_hz in zip(read_clips(config), frequencies_hz, strict=True):
        with AudioFile(audio_path(clip, audio_roots(config)), None) as file:
            ((samples, _),) = file.segments()
            spectrum = np.abs(np.fft.rfft(samples))
            assert np.argmax(spectrum) / (len(samples) / file.sample_rate_hz) == pytest.approx(frequency_hz, abs=4)


def test_slam_llm(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [
        {"key": "u1", "source": "a.wav", "target": "hello"},
        {"key": "u2", "source": "b.wav", "target": "bye", "prompt": "Write it down."},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    clips = read(path, {"question": "Transcribe.", "dataset": "libri", "task": "asr"})
    assert [c[:3] for c in clips] == [
        ("u1", "a.wav", [("Transcribe.", "hello")]),
        ("u2", "b.wav", [("Write it down.", "bye")]),
    ]
    assert (clips[0][3].dataset, clips[0][3].questions[0].task) == ("libri", "asr")
    with pytest.raises(UserError, match=r"m\.jsonl:1: has no 'prompt'.*table\.question"):
        read(path)


@pytest.mark.parametrize("as_array", [False, True])
def test_chat_messages(tmp_path, as_array):
    path = tmp_path / ("m.json" if as_array else "m.jsonl")
    turn = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A dog."}]
    more = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Far."}]
    rows = [
        {"messages": turn, "audios": ["a.wav"], "images": [], "system": ""},
        {"messages": turn, "audios": ["b.wav"]},
        {"messages": more, "audios": ["a.wav"]},
    ]
    path.write_text(json.dumps(rows, indent=1) if as_array else "\n".join(map(json.dumps, rows)))
    assert [c[:3] for c in read(path)] == [
        ("a.wav", "a.wav", [("What?", "A dog."), ("Where?", "Far.")]),
        ("b.wav", "b.wav", [("What?", "A dog.")]),
    ]
    path.write_text(json.dumps({"messages": turn, "audios": [1]}))
    with pytest.raises(UserError, match=r"m\.jsonl?:1: field 'audios"):
        read(path)


def test_audio_flamingo(tmp_path):
    path = tmp_path / "m.json"
    turns = [{"from": "human", "value": "<sound>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    path.write_text(json.dumps([{"id": "1", "sound": "a.wav", "conversations": turns, "duration": 3.0}]))
    assert [c[:3] for c in read(path)] == [("a.wav", "a.wav", [("What?", "A dog.")])]


def test_csv_of_audiocaps_and_clotho(tmp_path):
    audiocaps, clotho = tmp_path / "audiocaps.csv", tmp_path / "clotho.csv"
    audiocaps.write_text('audiocap_id,youtube_id,start_time,caption\n1,abc,10,A dog\n2,abc,10,"Barks, twice"\n')
    captions = ",".join(f"caption_{i}" for i in range(1, 6))
    clotho.write_text(f"file_name,{captions}\nrain on roof.wav,a,b,c,d,e\n")
    table = {"question": "What is heard?"}
    (clip,) = read(audiocaps, table)
    assert clip[:3] == ("abc.wav", "abc.wav", [("What is heard?", "A dog"), ("What is heard?", "Barks, twice")])
    (clip,) = read(clotho, table)
    assert clip[0] == "rain on roof.wav" and [answer for _, answer in clip[2]] == list("abcde")


def test_csv_by_templates(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id,wav,who\n7,x/7.wav,Ada\n")
    table = {"clip_id": "id{id}", "audio": "{wav}", "question": "Who is {id}?", "answers": ["It is {who}."]}
    assert read(path, table)[0][:3] == ("id7", "x/7.wav", [("Who is 7?", "It is Ada.")])
    with pytest.raises(UserError, match=r"m\.csv:2: row without the field 'caption'"):
        read(path, {**table, "answers": ["{caption}"]})
    with pytest.raises(UserError, match=r"table\.question: is not set"):
        read(path, {"audio": "{wav}"})


def test_folder_per_class(tmp_path):
    for name in ("jazz/2.wav", "jazz/1.wav", "blues/1.wav"):
        (tmp_path / "genres" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "genres" / name).write_bytes(wav_bytes(500 if "jazz" in name else 700))
    (tmp_path / "genres/jazz/notes.txt").write_text("no audio")
    table = {"question": "Which genre?", "domain": "music"}
    clips = read(tmp_path / "genres", table)
    assert [c[:3] for c in clips] == [
        (name, name, [("Which genre?", name.split("/")[0])]) for name in ("blues/1.wav", "jazz/1.wav", "jazz/2.wav")
    ]
    assert clips[0][3].questions[0].choices == ["blues", "jazz"]
    check_audio(tmp_path / "genres", [700, 500, 500], table=table)


def test_parquet_with_embedded_audio(tmp_path):
    path = tmp_path / "train-0.parquet"
    audio = [{"bytes": wav_bytes(f), "path": f"{f}.wav" if f != 700 else None} for f in (500, 600, 700)]
    table = pa.table({"speech": audio, "text": ["five", "six", "seven"]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    values = {"table": {"question": "Say it.", "answers": ["{text}"]}}
    assert [c[:3] for c in read(path, **values)] == [
        ("500.wav", "train-0.parquet#0/0", [("Say it.", "five")]),
        ("600.wav", "train-0.parquet#0/1", [("Say it.", "six")]),
        ("train-0.parquet#1/0", "train-0.parquet#1/0", [("Say it.", "seven")]),
    ]
    check_audio(path, [500, 600, 700], **values)


def test_webdataset_tars_by_pattern(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(2):
                frequency_hz = 500 + 200 * shard + 100 * i
                members = {
                    "json": json.dumps({"caption": f"tone {frequency_hz}", "id": i}).encode(),
                    "flac": wav_bytes(frequency_hz, format="FLAC"),
                    "cls": b"3\n",
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"d/{shard}{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    values = {"table": {"question": "What?", "answers": ["{caption} of {cls}"]}}
    clips = read(tmp_path / "*.tar", **values)
    assert [(c[0], c[2]) for c in clips] == [
        (f"d/{name}", [("What?", f"tone {f} of 3")]) for name, f in (("00", 500), ("01", 600), ("10", 700), ("11", 800))
    ]
    assert clips[0][1].startswith("0.tar#")
    check_audio(tmp_path / "*.tar", [500, 600, 700, 800], **values)
    with pytest.raises(UserError, match="matches no file"):
        read(tmp_path / "*.tar.gz", **values)


@pytest.mark.parametrize("text_of", [
    lambda rows: json.dumps(rows, indent=2),
    lambda rows: "  \n\n" + json.dumps(rows, ensure_ascii=False) + "\n \n",
    lambda rows: "\n".join(map(json.dumps, rows)),
    lambda rows: "\n\n" + "\r\n".join(map(json.dumps, rows)) + "\n",
], ids=["array", "array in blanks", "lines", "lines in blanks"])  # fmt: skip
def test_arrays_and_lines_give_the_same_records(tmp_path, text_of):
    path = tmp_path / "m.json"
    rows = [{"clip_id": f"é{i}", "audio": f"{i}.wav", "questions": []} for i in range(20)]
    path.write_text(text_of(rows), encoding="utf-8")
    assert [c[0] for c in read(path)] == [row["clip_id"] for row in rows]


@pytest.mark.parametrize("as_array", [False, True])
def test_numbers_of_json_stay_integers_and_floats(tmp_path, as_array):
    path = tmp_path / "m.json"
    record = {"i": 3, "negative": -7, "f": 2.5, "whole": 2.0, "exponent": 1e5, "list": [1, 0.5], "none": None}
    path.write_text(json.dumps([record] if as_array else record))
    ((_, value),) = json_records(str(path))
    assert value == record
    assert [type(item) for item in value.values()] == [int, int, float, float, float, list, type(None)]


def test_memory_is_bounded_by_a_record_and_not_by_the_array(tmp_path):
    path = tmp_path / "m.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(20_000):
            file.write(f"{',' if i else ''}{json.dumps({'id': i, 'text': 'x' * 1000})}")
        file.write("]")
    tracemalloc.start()
    count = sum(1 for _ in json_records(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("text", "location", "records"),
    [
        (b'[{"a": 1}] garbage', "after record 1", 1),
        (b'[{"a": 1}, {"b": 2}', "after record 2", 2),
        (b'[{"a": 1}, {"b"', "after record 1", 1),
        (b'[{"a": 1} {"b": 2}]', "after record 1", 1),
        (b'[{"a": 1},]', "after record 1", 1),
        (b"[", "m.json: bad JSON", 0),
        (b'[{"a": "\xff"}]', "m.json: bad JSON", 0),
        (b"[]]", "m.json: bad JSON", 0),
    ],
)
def test_a_damaged_array_is_one_error_that_names_the_file_and_the_last_record(tmp_path, text, location, records):
    path = tmp_path / "m.json"
    path.write_bytes(text)
    values = []
    with pytest.raises(UserError, match=r"m\.json.*bad JSON.*; correct or complete the array") as error:
        for _, value in json_records(str(path)):
            values.append(value)
    assert location in str(error.value) and "\n" not in str(error.value)
    assert len(values) == records


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (r'{"a": "one", "b": 1, "a": "two"}', "key 'a' occurs twice"),
        (r'{"x": {"a": "one", "a": "two"}}', "key 'a' occurs twice"),
        (r'{"a": "half \ud83d"}', "half of a character"),
        (r'{"a": "half \uD83Dx \ude00"}', "half of a character"),
        (r'{"a": "half \\\ud83d"}', "half of a character"),
    ],
)
def test_json_of_which_a_text_would_be_lost_or_changed_is_refused(tmp_path, as_array, text, fault):
    path = tmp_path / "m.json"
    path.write_text(f"[{text}]" if as_array else text)
    with pytest.raises(UserError, match=rf"m\.json.*{fault}"):
        list(json_records(str(path)))


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("padding", [0, 65500, 65520, 65530, 65536])
def test_whole_characters_and_escaped_backslashes_are_kept(tmp_path, as_array, padding):
    path = tmp_path / "m.json"
    record = {"padding": "x" * padding, "a": "\U0001f600 \\ud83d \u00e9", "b": "\U0001f600" * 20}
    text = json.dumps(record)
    path.write_text(f"[{text}]" if as_array else text)
    assert [value for _, value in json_records(str(path))] == [record]
