"""Tests that a clip is its audio in every format: no sound, question, dataset or domain is lost to a shared id."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_prep import validate
from data_prep.config import PrepareConfig
from data_prep.manifests.clips import Clip, RejectedRow
from data_prep.manifests.reader import audio_path, audio_roots, read_clips
from data_prep.prepare import prepare
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.question_sets import make_predictions
from pipeline.inference.responder import Reply
from tests.data_prep.test_manifest_formats import wav_bytes
from tests.helpers.corpora import prepare_config, prepare_here, write_manifest


def openaqa(audio, question, answer="A dog.", dataset="as", task="cla"):
    return {"instruction": question, "input": "", "audio_id": audio, "dataset": dataset, "task": task, "output": answer}


def slam(key, source, target):
    return {"key": key, "source": source, "target": target, "prompt": "Write."}


def questions_of(clips):
    return {clip.clip_id: [(q.question_id, q.question, q.answer) for q in clip.questions] for clip in clips}


def read(manifest, folder, **values):
    return list(read_clips(prepare_config(manifest, folder / "out", **values)))


def test_open_and_closed_questions_in_two_files_are_about_the_same_clips(tmp_path):
    closed = write_manifest(tmp_path / "closed.json", [openaqa("a.wav", "Label?"), openaqa("b.wav", "Label?")])
    open_ended = write_manifest(tmp_path / "open.json", [openaqa("b.wav", "Why?"), openaqa("a.wav", "How?")])
    assert questions_of(read([closed, open_ended], tmp_path)) == {
        "a.wav": [("a.wav/0", "Label?", "A dog."), ("a.wav/1", "How?", "A dog.")],
        "b.wav": [("b.wav/0", "Label?", "A dog."), ("b.wav/1", "Why?", "A dog.")],
    }


@pytest.mark.parametrize("second", ["m.json", "./m.json", "*.json"])
def test_a_manifest_that_is_given_twice_is_refused(tmp_path, second):
    path = write_manifest(tmp_path / "m.json", [openaqa("a.wav", "Label?")])
    with pytest.raises(UserError, match=r"m\.json: is given twice.*remove one from `manifest`"):
        config = PrepareConfig(manifest=[str(path), f"{tmp_path}/{second}"], output="out")
        list(read_clips(config))


def test_keys_that_count_from_zero_in_two_files_name_two_sounds(tmp_path):
    files = [
        write_manifest(tmp_path / f"{name}.jsonl", [slam("0", f"{name}.wav", f"{name} spoken")]) for name in ("x", "y")
    ]
    clips = read(files, tmp_path)
    assert [(c.clip_id, c.audio, c.questions[0].answer) for c in clips] == [
        ("0", "x.wav", "x spoken"),
        ("0@y.wav", "y.wav", "y spoken"),
    ]
    assert [c.questions[0].question_id for c in clips] == ["0/0", "0@y.wav/0"]


def test_one_id_in_two_folders_names_two_sounds(tmp_path):
    files = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        files.append(write_manifest(tmp_path / name / "m.jsonl", [slam("0", "a.wav", name)]))
    clips = read(files, tmp_path)
    assert [(c.clip_id, c.root, c.questions[0].answer) for c in clips] == [
        ("0", 0, "one"),
        ("0@a.wav", 1, "two"),
        ("0@a.wav#2", 2, "three"),
    ]


def test_one_sound_under_several_ids_is_one_clip_with_the_questions_of_all(tmp_path):
    rows = [slam("u1", "a.wav", "one"), slam("u2", "./x/../a.wav", "two"), slam("u1", "b.wav", "three")]
    path = write_manifest(tmp_path / "m.jsonl", [*rows, slam("u2", str(tmp_path / "a.wav"), "four")])
    assert questions_of(read(path, tmp_path)) == {
        "u1": [("u1/0", "Write.", "one"), ("u2/0", "Write.", "two"), ("u2/1", "Write.", "four")],
        "u1@b.wav": [("u1@b.wav/0", "Write.", "three")],
    }


def test_a_repeated_row_of_our_own_format_is_rejected_by_name(tmp_path):
    row = {"clip_id": "a", "audio": "a.wav", "questions": [{"question_id": "q", "question": "?", "answer": "!"}]}
    rejected, clip = read(write_manifest(tmp_path / "m.jsonl", [row, row]), tmp_path)
    assert isinstance(rejected, RejectedRow) and (rejected.clip_id, rejected.reason) == ("a", "duplicate_id")
    assert isinstance(clip, Clip) and [q.question_id for q in clip.questions] == ["q"]


def test_questions_without_audio_keep_their_groups_apart(tmp_path):
    row = {"clip_id": "a", "questions": [{"question": "?", "answer": "!"}]}
    rejected, clip = read(write_manifest(tmp_path / "m.jsonl", [row, row]), tmp_path, encoders={})
    assert rejected.reason == "duplicate_id" and len(clip.questions) == 1


def write_shard(path, rows):
    """Writes a Hugging Face shard from (path, frequency of the tone in Hz, question)."""
    audio = [{"path": name, "bytes": wav_bytes(frequency_hz)} for name, frequency_hz, _ in rows]
    table = pa.table({"audio": audio, "question": [question for *_, question in rows], "answer": ["x"] * len(rows)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def test_parquet_rows_are_about_the_same_clip_when_their_audio_is_the_same(tmp_path):
    write_shard(tmp_path / "0.parquet", [("0.wav", 500, "A?"), ("1.wav", 600, "B?"), ("0.wav", 500, "C?")])
    write_shard(tmp_path / "1.parquet", [("0.wav", 700, "D?"), ("1.wav", 600, "E?"), ("0.wav", 700, "F?")])
    values = {"table": {"question": "{question}", "answers": ["{answer}"]}}
    config = prepare_config(tmp_path / "*.parquet", tmp_path / "set", **values)
    clips = list(read_clips(config))
    assert {clip.clip_id: [q.question for q in clip.questions] for clip in clips} == {
        "0.wav": ["A?", "C?"],
        "1.wav": ["B?", "E?"],
        "0.wav@1.parquet#0/0": ["D?", "F?"],
    }
    assert audio_path(clips[2], audio_roots(config)) == str(tmp_path / "1.parquet#0/0")


def test_parquet_rows_that_share_a_path_are_as_many_clips_as_sounds(tmp_path):
    frequencies_hz = [500, 600, 500, 700, 600, 600, 800]
    write_shard(tmp_path / "0.parquet", [("audio.wav", f, f"{i}?") for i, f in enumerate(frequencies_hz)])
    values = {"table": {"question": "{question}", "answers": ["{answer}"]}}
    clips = read(tmp_path / "0.parquet", tmp_path, **values)
    assert [[q.question for q in clip.questions] for clip in clips] == [
        ["0?", "2?"],
        ["1?", "4?", "5?"],
        ["3?"],
        ["6?"],
    ]
    assert len({clip.clip_id for clip in clips}) == len(clips)


@pytest.mark.parametrize(
    ("audio_paths", "audio_root", "expected"),
    [
        ({"/data/sls": "."}, "audio", "audioset/x/a.wav"),
        ({"/data/sls/audioset/": "mine"}, "audio", "mine/x/a.wav"),
        ({"/data": "wrong", "/data/sls/audioset/x": "mine"}, "audio", "mine/a.wav"),
        ({"/data/sls": "/local"}, "audio", "/local/audioset/x/a.wav"),
        ({"/data/sls": "/local"}, None, "/local/audioset/x/a.wav"),
        ({"/data/sls": "s3://bucket/sls"}, None, "s3://bucket/sls/audioset/x/a.wav"),
        ({"/data/sl": "wrong"}, None, "/data/sls/audioset/x/a.wav"),
    ],
)
def test_the_start_of_a_path_is_replaced(tmp_path, audio_paths, audio_root, expected):
    path = write_manifest(tmp_path / "m.json", [openaqa("/data/sls/audioset/x/a.wav", "?")])
    (clip,) = read(path, tmp_path, audio_paths=audio_paths, audio_root=audio_root)
    assert (clip.clip_id, clip.audio) == ("/data/sls/audioset/x/a.wav", expected)


@pytest.mark.parametrize("audio", ["/data/sls/../../etc/a.wav", "/data/sls/x/../../a.wav", "/data/other/a.wav"])
def test_a_replaced_path_stays_in_its_folder(tmp_path, audio):
    path = write_manifest(tmp_path / "m.json", [openaqa(audio, "?")])
    (rejected,) = read(path, tmp_path, audio_paths={"/data/sls": "/local"}, audio_root="audio")
    assert rejected.reason == "outside_root" and audio in rejected.detail


@pytest.mark.parametrize("audio", ["", " ", "a\0.wav"])
def test_an_impossible_path_rejects_its_row(tmp_path, audio):
    path = write_manifest(tmp_path / "m.jsonl", [slam("0", audio, "x"), slam("1", "b.wav", "y")])
    rejected, clip = read(path, tmp_path)
    assert (rejected.clip_id, rejected.reason, clip.clip_id) == ("0", "no_audio", "1")


def test_a_dry_run_names_paths_of_another_machine_as_the_run_does(tmp_path):
    path = write_manifest(tmp_path / "m.json", [openaqa("/data/sls/a.wav", "?")])
    with pytest.raises(UserError, match=r"/data/sls/a\.wav is absolute, but audio_root is set.*audio_paths"):
        prepare(prepare_config(path, tmp_path / "set", audio_root=str(tmp_path)), dry_run=True)
    with pytest.raises(UserError, match=r"holds no clip to prepare: 1 rows are rejected.*the audio path is empty"):
        empty = write_manifest(tmp_path / "e.json", [openaqa("", "?")])
        prepare(prepare_config(empty, tmp_path / "set"), dry_run=True)


def test_paths_of_another_machine_are_named_with_the_remedy_which_works(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.wav").write_bytes(wav_bytes(500))
    path = write_manifest(tmp_path / "m.json", [openaqa("/data/sls/a.wav", "?")])
    with pytest.raises(UserError, match=r"1 of 1 .* /data/sls/a\.wav is absolute, but audio_root is set.*audio_paths"):
        prepare_here(prepare_config(path, tmp_path / "set", audio_root=str(tmp_path)))
    with pytest.raises(UserError, match=r"1 of 1 .* do not exist, for example /data/sls/a\.wav.*`audio_paths`"):
        prepare_here(prepare_config(path, tmp_path / "set"))
    prepare_here(prepare_config(path, tmp_path / "set", audio_root=str(tmp_path), audio_paths={"/data/sls": "mine"}))
    assert FeatureSet(str(tmp_path / "set"), ["log_mel"]).clip(0).clip_id == "/data/sls/a.wav"


def test_a_question_keeps_its_dataset_and_domain_from_the_row_to_the_score(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.wav").write_bytes(wav_bytes(500 if name == "a" else 700))
    rows = [
        {"clip_id": clip_id, "audio": audio, "dataset": dataset, "domain": domain, "questions": [
            {"question": "What?", "answer": "a tone", "task": task}]}
        for clip_id, audio, dataset, domain, task in (
            ("a", "a.wav", "first", "sound", "t1"), ("b", "b.wav", "first", "sound", "t1"),
            ("other", "a.wav", "second", "music", "t2"),
        )
    ]  # fmt: skip
    prepare_here(prepare_config(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "set"))
    assert validate.main([str(tmp_path / "set")]) == 0
    features = FeatureSet(str(tmp_path / "set"), ["log_mel"])
    assert [features.table.datasets[code] for code in features.table.dataset] == ["first", "second", "first"]
    predictions = make_predictions(features, dict.fromkeys(range(3), Reply("", False)))
    assert [(p.question_id, p.clip_id, p.domain, p.task) for p in predictions] == [
        ("a/0", "a", "sound", "t1"),
        ("other/0", "a", "music", "t2"),
        ("b/0", "b", "sound", "t1"),
    ]


def test_a_question_without_its_own_source_is_stored_as_before():
    values = {"question_id": "q", "question": "?", "answer": "!", "task": "t", "choices": None}
    assert json.loads(Question(**values).model_dump_json()) == values
    assert Question(**values, domain="music").model_dump() == {**values, "domain": "music"}
