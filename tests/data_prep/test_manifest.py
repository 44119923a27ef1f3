import json
from pathlib import Path

import pytest

from data_prep.manifests.reader import audio_roots, read_clips
from pipeline.core.errors import UserError
from tests.helpers.corpora import clip_row, prepare_config, write_manifest


def read(path: Path, **values):
    return list(read_clips(prepare_config(path, path.parent / "out", **values)))


def test_json_lines_keep_rows_questions_and_their_order(tmp_path):
    rows = [clip_row("a", "x/a.wav"), clip_row("b", "./x/../b.wav")]
    rows[1]["questions"][0]["choices"] = ["a tone", "noise"]
    clips = read(write_manifest(tmp_path / "m.jsonl", rows))
    assert [(c.clip_id, c.audio, c.dataset, c.domain) for c in clips] == [
        ("a", "x/a.wav", "tones", "sound"),
        ("b", "b.wav", "tones", "sound"),
    ]
    assert [q.model_dump(exclude_none=True) for q in clips[1].questions] == rows[1]["questions"]


def test_question_ids_are_made_where_there_are_none(tmp_path):
    row = clip_row("a", "a.wav")
    for question in row["questions"]:
        del question["question_id"]
    (clip,) = read(write_manifest(tmp_path / "m.jsonl", [row]))
    assert [q.question_id for q in clip.questions] == ["a/0", "a/1"]


def test_several_manifests_each_have_their_root(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    paths = [write_manifest(tmp_path / d / "m.jsonl", [clip_row(d, "a.wav")]) for d in ("one", "two")]
    config = prepare_config(paths, tmp_path / "out")
    roots = audio_roots(config)
    assert [f"{roots[c.root]}/{c.audio}" for c in read_clips(config)] == [
        f"{tmp_path}/one/a.wav",
        f"{tmp_path}/two/a.wav",
    ]


@pytest.mark.parametrize(
    ("audio", "audio_root", "expected"),
    [
        ("../a.wav", None, None),
        ("x/../../a.wav", None, None),
        ("..a.wav", None, "..a.wav"),
        ("/data/a.wav", None, "/data/a.wav"),
        ("/data/a.wav", "/data", None),
        ("a.wav", "/data", "a.wav"),
    ],
)
def test_no_path_leaves_its_root(tmp_path, audio, audio_root, expected):
    (clip,) = read(write_manifest(tmp_path / "m.jsonl", [clip_row("a", audio)]), audio_root=audio_root)
    assert clip.audio == expected


OPENAQA = {"instruction": "What?", "input": "", "dataset": "as", "task": "cla", "output": "A dog."}


def test_openaqa_is_grouped_by_clip_in_order(tmp_path):
    records = [
        {**OPENAQA, "audio_id": "b.flac"},
        {**OPENAQA, "audio_id": "a.flac", "instruction": "Who?", "input": "hint"},
        {**OPENAQA, "audio_id": "b.flac", "output": "A cat.", "task": "open"},
    ]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(records))
    clips = read(path)
    assert [(c.clip_id, [(q.question, q.answer, q.task) for q in c.questions]) for c in clips] == [
        ("b.flac", [("What?", "A dog.", "cla"), ("What?", "A cat.", "open")]),
        ("a.flac", [("Who?\nhint", "A dog.", "cla")]),
    ]
    assert {c.dataset for c in clips} == {"as"}


def without(row: dict, field: str) -> dict:
    return {key: value for key, value in row.items() if key != field}


ROW = clip_row("a", "a.wav")
RECORD = {**OPENAQA, "audio_id": "a"}


@pytest.mark.parametrize(
    ("name", "text", "location", "fault"),
    [
        ("m.jsonl", f"{json.dumps(ROW)}\n{{oops\n", "m.jsonl:2", "bad JSON"),
        ("m.jsonl", "\n" + json.dumps(without(ROW, "audio")), "m.jsonl:2", "without the field 'audio'"),
        ("m.jsonl", json.dumps({**ROW, "questions": [{"question": "?"}]}), "m.jsonl:1", "'questions.0.answer'"),
        ("m.jsonl", json.dumps({**ROW, "dataset": 3}), "m.jsonl:1", "field 'dataset'"),
        ("m.jsonl", json.dumps({**ROW, "titel": "x"}), "m.jsonl:1", "field 'titel'"),
        ("m.jsonl", "[1, 2]", "m.jsonl: record 1", "row"),
        ("m.json", f"[\n{json.dumps(OPENAQA)}]", "m.json: record 1", "without the field 'audio_id'"),
        ("m.json", json.dumps([RECORD])[:-1], "m.json: after record 1", "bad JSON"),
        ("m.json", json.dumps([RECORD])[:-5], "m.json", "bad JSON"),
        ("m.json", "{}", "m.json:1", "without the field 'clip_id'"),
        ("m.jsonl", None, "m.jsonl", "no such manifest"),
    ],
)
def test_a_bad_manifest_is_a_one_line_error_with_its_location(tmp_path, name, text, location, fault):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert location in str(error.value) and fault in str(error.value) and "\n" not in str(error.value)
