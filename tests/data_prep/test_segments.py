"""Tests segments of audio files: their names in every format, their samples, and the checks of their length."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import soundfile

from data_prep.audio import decode
from data_prep.audio.decode import AudioFile, Reject
from data_prep.audio.fragments import split_fragment, with_fragment
from data_prep.manifests.clips import Clip, RejectedRow
from data_prep.manifests.reader import audio_path, audio_roots, read_clips
from pipeline.core.errors import UserError
from tests.helpers.corpora import prepare_config

RATE_HZ = 16000
TURNS = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A dog."}]
CHAT = {"messages": TURNS, "audios": ["a.wav"]}
FLAMINGO = {
    "sound": "a.wav",
    "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}],
}
SLAM = {"key": "k", "source": "a.wav", "target": "hello", "prompt": "Write."}
OPENAQA = {"instruction": "What?", "audio_id": "a.wav", "dataset": "d", "task": "t", "output": "A dog."}
OWN = {"clip_id": "k", "audio": "a.wav", "questions": [{"question": "What?", "answer": "A dog."}]}


def noise(seconds, rate_hz=RATE_HZ):
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate_hz))).astype(np.float32)


def samples(path):
    with AudioFile(str(path), None) as file:
        return np.concatenate([samples for samples, _ in file.segments()])


def reject(path, max_clip_s=None):
    with pytest.raises(Reject) as error, AudioFile(str(path), max_clip_s) as file:
        list(file.segments())
    return error.value.reason, error.value.detail


def read(tmp_path, *rows, name="m.jsonl", **values):
    text = rows[0] if isinstance(rows[0], str) else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return list(read_clips(prepare_config(tmp_path / name, tmp_path / "out", **values)))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("a.wav", ("a.wav", None, None)),
        ("a.wav#t=2,7.5", ("a.wav", 2.0, 7.5)),
        ("a.wav#t=2", ("a.wav", 2.0, None)),
        ("a.wav#t=,7.5", ("a.wav", None, 7.5)),
        ("s3://b/a#1.tar#512:99#t=0.000125,1", ("s3://b/a#1.tar#512:99", 0.000125, 1.0)),
    ],
)
def test_an_address_names_a_file_and_its_segment(address, parts):
    assert split_fragment(address) == parts and with_fragment(*parts) == address


@pytest.mark.parametrize("name", ["a#t=.wav", "a#1.wav", "a.wav#t=", "a.wav#t=x", "a.wav#t=1,2.flac"])
def test_other_names_with_a_hash_are_files(name):
    assert split_fragment(name) == (name, None, None)


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"), ("a.wav", "FLOAT"), ("a.wav", "GSM610"), ("a.wav", "MS_ADPCM"), ("a.flac", "PCM_16"),
        ("a.aiff", "PCM_16"), ("a.au", "ULAW"), ("a.ogg", "VORBIS"), ("a.ogg", "OPUS"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("start_s", "end_s"), [(None, 0.5), (0.0001, 2.0), (31.00003, 33.3), (40, None)])
def test_a_segment_has_the_samples_of_the_whole_file(tmp_path, name, subtype, start_s, end_s):
    rate_hz = 8000 if subtype == "GSM610" else RATE_HZ
    soundfile.write(tmp_path / name, noise(41, rate_hz), rate_hz, subtype=subtype)
    whole = samples(tmp_path / name)
    first = round((start_s or 0) * rate_hz)
    stop = len(whole) if end_s is None else round(end_s * rate_hz)
    segment = samples(with_fragment(str(tmp_path / name), start_s, end_s))
    np.testing.assert_array_equal(segment, whole[first:stop])


def test_a_segment_of_an_mp3_begins_at_its_sample(tmp_path):
    soundfile.write(tmp_path / "a.mp3", noise(5), RATE_HZ)
    whole = samples(tmp_path / "a.mp3")
    segment = samples(f"{tmp_path}/a.mp3#t=2.5,3.25")
    np.testing.assert_allclose(segment, whole[40000:52000], atol=1e-6)


def test_a_segment_of_a_stream_without_a_length(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(3), RATE_HZ)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # the number of samples in STREAMINFO: 0 means that it is not known
    data[22:26] = bytes(4)
    whole = samples(tmp_path / "a.flac")
    (tmp_path / "pipe.flac").write_bytes(data)
    np.testing.assert_array_equal(samples(f"{tmp_path}/pipe.flac#t=1.5,2"), whole[24000:32000])


def test_the_duration_and_the_limits_are_those_of_the_segment(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(10), RATE_HZ)
    path = f"{tmp_path}/a.wav"
    with AudioFile(f"{path}#t=2,4.5", 3.0) as file:
        assert file.duration_s == 2.5
    assert reject(f"{path}#t=2,6", 3.0) == ("too_long", "4.0 s")
    assert reject(f"{path}#t=2,2.01")[0] == "too_short"


@pytest.mark.parametrize(
    ("fragment", "detail"),
    [
        ("#t=9,10.06", "from 9 s to 10.06 s, the file has 10.00 s"),
        ("#t=10", "from 10 s to the end, the file has 10.00 s"),
        ("#t=12,13", "from 12 s to 13 s, the file has 10.00 s"),
    ],
)
def test_a_segment_behind_the_end_is_rejected(tmp_path, fragment, detail):
    soundfile.write(tmp_path / "a.wav", noise(10), RATE_HZ)
    assert reject(f"{tmp_path}/a.wav{fragment}") == ("bad_segment", detail)


def test_an_end_that_is_rounded_up_is_that_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(9.97), RATE_HZ)
    assert len(samples(f"{tmp_path}/a.wav#t=9,10")) == round(0.97 * RATE_HZ)


def test_a_file_without_its_end_still_has_its_beginning(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(10), RATE_HZ)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[: 44 + 2 * 4 * RATE_HZ])
    np.testing.assert_array_equal(samples(f"{tmp_path}/cut.wav#t=1,4"), samples(f"{tmp_path}/a.wav#t=1,4"))
    reason, detail = reject(f"{tmp_path}/cut.wav#t=3,5")
    assert reason == "truncated" and "states 320000 bytes" in detail
    assert reject(f"{tmp_path}/cut.wav#t=1")[0] == reject(f"{tmp_path}/cut.wav")[0] == "truncated"


def test_warnings_are_about_the_segment(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.concatenate([np.zeros(RATE_HZ, np.float32), noise(1)]), RATE_HZ)
    notes = []
    for fragment in ("#t=0,1", "#t=1"):
        with AudioFile(f"{tmp_path}/a.wav{fragment}", None) as file:
            list(file.segments())
            notes.append(file.notes)
    assert notes == [{"silent": "all samples are 0"}, {}]


def test_a_file_is_searched_for_faults_once_for_all_its_segments(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", noise(5), RATE_HZ)
    calls = []
    monkeypatch.setattr(
        decode, "check_length", lambda stream, check=decode.check_length: calls.append(1) or check(stream)
    )
    for second in range(4):
        samples(f"{tmp_path}/a.flac#t={second},{second + 1}")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("row", "segment"),
    [
        ({**OWN, "start_s": 2, "end_s": 7.5}, (2, 7.5)),
        ({**OWN, "end_s": 7.5}, (None, 7.5)),
        ({**OWN, "audio": "a.wav#t=2,7.5"}, (2, 7.5)),
        ({**CHAT, "start": 2, "end": 7.5}, (2, 7.5)),
        ({**CHAT, "start_time": "2", "end_time": "7.5"}, (2, 7.5)),
        ({**CHAT, "start_ms": 2000, "end_ms": 7500}, (2, 7.5)),
        ({**CHAT, "audios": [{"path": "a.wav", "start_s": 2, "end_s": 7.5}]}, (2, 7.5)),
        ({**FLAMINGO, "start_sec": 2, "end_sec": 7.5, "duration": 60}, (2, 7.5)),
        ({**SLAM, "offset": 2, "duration": 5.5}, (2, 7.5)),
        ({**SLAM, "offset": 0, "duration": 5.5}, (None, 5.5)),
        ({**SLAM, "offset": 2, "duration": -1}, (2, None)),
        ({**SLAM, "duration": 5.5}, (None, None)),
        ({**OPENAQA, "begin": 2}, (2, None)),
        ({**OPENAQA, "start": 0, "end": None, "frame_offset": 0, "num_frames": -1}, (None, None)),
    ],
)
def test_every_json_format_names_segments(tmp_path, row, segment):
    (clip,) = read(tmp_path, row)
    assert (clip.audio, clip.start_s, clip.end_s) == ("a.wav", *segment)


def test_segments_of_a_file_are_clips_of_their_own(tmp_path):
    rows = [{**CHAT, "start": 0, "end": 2}, {**CHAT, "start": 2, "end": 4}, {**CHAT, "begin": 0.0, "end": 2.0}, CHAT]
    clips = read(tmp_path, *rows)
    counts = [(clip.clip_id, len(clip.questions)) for clip in clips]
    assert counts == [("a.wav#t=,2", 2), ("a.wav#t=2,4", 1), ("a.wav", 1)]
    roots = audio_roots(prepare_config(tmp_path / "m.jsonl", tmp_path / "out"))
    assert [audio_path(clip, roots) for clip in clips] == [f"{tmp_path}/{name}" for name, _ in counts]


def test_segments_that_share_an_id_are_told_apart(tmp_path):
    rows = [{**SLAM, "offset": start, "duration": 2} for start in (2, 4)]
    assert [clip.clip_id for clip in read(tmp_path, *rows)] == ["k", "k@a.wav#t=4,6"]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({**OWN, "start_s": 3, "end_s": 2}, "the segment of a.wav from 3 s to 2 s has no length"),
        ({**OWN, "start_s": -1}, "the segment of a.wav from -1 s to the end has no length"),
        ({**OWN, "end_s": 0}, "the segment of a.wav from 0 s to 0 s has no length"),
        ({**CHAT, "start": 3, "end": 3}, "from 3 s to 3 s has no length"),
        ({**OWN, "audio": "a.wav#t=2,3", "end_s": 5}, "a.wav#t=2,3 names a segment, and the row names another"),
    ],
)
def test_a_segment_without_length_rejects_its_row(tmp_path, row, detail):
    (rejected,) = read(tmp_path, row)
    assert isinstance(rejected, RejectedRow) and rejected.reason == "bad_segment" and detail in rejected.detail


def test_a_time_that_is_no_number_is_an_error(tmp_path):
    with pytest.raises(UserError, match="field 'start_s'"):
        read(tmp_path, {**OWN, "start_s": math.nan})


def test_templates_select_segments_of_a_table(tmp_path):
    table = {"question": "What?", "start": "{from}", "end": "{to}"}
    text = "audio,from,to,answer\na.wav,2,7.5,dog\na.wav,7.5,9,cat\na.wav,,9,cow\n"
    rejected, first, second = read(tmp_path, text, name="m.csv", table=table)
    assert [(clip.clip_id, clip.start_s, clip.end_s) for clip in (first, second)] == [
        ("a.wav#t=2,7.5", 2, 7.5),
        ("a.wav#t=7.5,9", 7.5, 9),
    ]
    assert (rejected.reason, rejected.detail) == ("empty_field", "the field 'from' is empty")


def test_a_time_of_a_table_is_in_seconds(tmp_path):
    with pytest.raises(UserError, match=r"m.csv:2: `table.start` is '0:02' here, not a number; give it in seconds"):
        read(tmp_path, "audio,from,answer\na.wav,0:02,dog\n", name="m.csv", table={"question": "?", "start": "{from}"})


def test_times_of_a_table_are_not_passed_over(tmp_path):
    text = "audio,start_time,end_time,answer\na.wav,2,7.5,dog\n"
    with pytest.raises(UserError) as error:
        read(tmp_path, text, name="m.csv", table={"question": "?"})
    assert "columns 'start_time' and 'end_time', which no template names" in str(error.value)
    templates = {"start": "{start_time}", "end": "{end_time}"}
    (clip,) = read(tmp_path, text, name="m.csv", table={"question": "?", **templates})
    assert (clip.start_s, clip.end_s) == (2, 7.5)
    (clip,) = read(tmp_path, text, name="m.csv", table={"question": "?", "start": None})
    assert isinstance(clip, Clip) and (clip.audio, clip.start_s, clip.end_s) == ("a.wav", None, None)
    (clip,) = read(tmp_path, text, name="m.csv", table={"question": "?", "audio": "{audio}_{start_time}.wav"})
    assert clip.audio == "a.wav_2.wav"


def test_the_times_of_audiocaps_are_those_of_the_video(tmp_path):
    text = "audiocap_id,youtube_id,start_time,caption\n1,abc,30,A dog barks.\n"
    (clip,) = read(tmp_path, text, name="m.csv", table={"question": "What?"})
    assert (clip.audio, clip.start_s, clip.end_s) == ("abc.wav", None, None)


def test_segments_of_a_member_of_an_archive_are_clips_of_their_own(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(5), RATE_HZ)
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        for number, (start, end) in enumerate([(1, 2), (3, 4.5)]):
            for name, data in (
                (f"{number}.json", json.dumps({"from": start, "to": end, "answer": "x"}).encode()),
                (f"{number}.wav", (tmp_path / "a.wav").read_bytes()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = {"question": "?", "start": "{from}", "end": "{to}", "clip_id": "same"}
    config = prepare_config(tmp_path / "m.tar", tmp_path / "out", table=table)
    clips = list(read_clips(config))
    assert len(clips) == 2 and clips[0].clip_id == "same" and clips[1].clip_id.endswith("#t=3,4.5")
    for clip, (first, stop) in zip(clips, [(16000, 32000), (48000, 72000)], strict=True):
        expected = samples(tmp_path / "a.wav")[first:stop]
        np.testing.assert_array_equal(samples(audio_path(clip, audio_roots(config))), expected)
