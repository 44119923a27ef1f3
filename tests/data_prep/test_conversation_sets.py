"""Tests feature sets with conversations and segments: their clips, what is left out, and how they are resumed."""

import json

import numpy as np
import pytest
import soundfile

from data_prep import validate
from data_prep.encoders.build import describe_encoder
from data_prep.job.commits import column_names, remove_commit
from data_prep.job.errors import PreparationFailed
from data_prep.job.mds_writer import read_partition
from data_prep.job.partitions import load_plan, plan_settings, require_same_settings
from data_prep.job.store import open_store
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import CLIP_COLUMNS, CLIPS, load_contract
from pipeline.data.mds_reader import MdsReader
from tests.helpers.corpora import hashes, prepare_config, prepare_here, tone, write_manifest


def question(text, *others, **values):
    return {"question": text, "answer": "yes", "other_audio": list(others), **values}


def row(clip_id, audio, *questions, **values):
    return {"clip_id": clip_id, "audio": audio, "questions": list(questions), **values}


ROWS = [
    row("a", "a.wav", question("Loud?"), question("<audio> or <audio>?", "b.wav")),
    row(
        "c",
        "c.wav",
        question("<audio> or <audio>?", "bad.wav", question_id="lost"),
        question("<audio>, <audio>?", "a.wav"),
    ),
    row("end", "long.wav", question("<audio> or <audio>?", {"audio": "long.wav", "end_s": 1}), start_s=1.5, end_s=2.25),
]


@pytest.fixture
def config(tmp_path):
    for name, seconds in (("a", 0.5), ("b", 0.6), ("c", 0.7), ("long", 3.0)):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds, 16000), 16000)
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    manifest = write_manifest(tmp_path / "m.jsonl", ROWS)
    return prepare_config(manifest, tmp_path / "set", partition_clips=3, max_reject_fraction=0.5)


def read_clips_column(config):
    store = open_store(config.output)
    index = json.loads(store.read("clips/index.json"))
    folders = dict.fromkeys(shard["raw_data"]["basename"].split("/")[0] for shard in index["shards"])
    return {sample["clip_id"]: sample for name in folders for sample in read_partition(store.root / CLIPS / name)}


def rejects(config):
    lines = open_store(config.output).read("rejects.jsonl").splitlines()
    return [{key: value for key, value in json.loads(line).items() if value is not None} for line in lines]


def problems(config):
    return validate.find_problems(open_store(config.output), load_contract(config.output))


def test_the_other_sounds_of_conversations_are_clips_of_the_set(config):
    prepare_here(config)
    clips = read_clips_column(config)
    assert {name: len(clip["questions"]) for name, clip in clips.items()} == {
        "a": 2,
        "b.wav": 0,
        "c": 2,
        "end": 1,
        "long.wav#t=,1": 0,
    }
    assert clips["a"]["questions"][1]["clips"] == ["b.wav"] and "clips" not in clips["a"]["questions"][0]
    assert clips["c"]["questions"][1]["clips"] == ["a"]
    assert clips["end"]["questions"][0]["clips"] == ["long.wav#t=,1"]


def test_a_clip_stores_its_audio_and_the_duration_of_its_segment(config, tmp_path):
    prepare_here(config)
    clips = read_clips_column(config)
    assert clips["end"]["audio"] == f"{tmp_path}/long.wav#t=1.5,2.25"
    assert clips["a"]["audio"] == f"{tmp_path}/a.wav"
    assert [clips[name]["duration_s"] for name in ("end", "long.wav#t=,1", "a")] == [0.75, 1.0, 0.5]


def test_a_conversation_about_a_rejected_clip_is_rejected_by_its_id(config):
    prepare_here(config)
    assert [(reject["clip_id"], reject.get("question_id"), reject["reason"]) for reject in rejects(config)] == [
        ("bad.wav", None, "undecodable"),
        ("c", "lost", "missing_clip"),
    ]
    assert rejects(config)[1]["detail"] == "clip 'bad.wav' of the conversation is rejected (undecodable)"
    contract = load_contract(config.output)
    assert (contract.clips, contract.questions, contract.rejected) == (5, 4, 2)
    assert problems(config) == []


def test_rejected_conversations_count_towards_the_limit(config, tmp_path):
    rows = [*ROWS[:1], row("c", "c.wav", *(question("<audio> or <audio>?", "bad.wav") for _ in range(3)))]
    write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(
        PreparationFailed, match=r"1 of 4 clips and 3 conversations about them rejected.*3 missing_clip, 1"
    ):
        prepare_here(config)


def test_a_resumed_set_has_the_same_bytes(config, tmp_path):
    prepare_here(config)
    finished = hashes(tmp_path / "set")
    store = open_store(config.output)
    remove_commit(store, 1)
    prepare_here(config)
    assert hashes(tmp_path / "set") == finished and problems(config) == []


def test_a_repaired_clip_brings_its_conversation_back(config, tmp_path):
    prepare_here(config)
    soundfile.write(tmp_path / "bad.wav", tone(0.5, 16000), 16000)
    remove_commit(open_store(config.output), 1)  # as --retry-rejects does
    prepare_here(config)
    assert rejects(config) == [] and load_contract(config.output).questions == 5 and problems(config) == []


def test_a_set_grows_by_conversations(config, tmp_path):
    prepare_here(config)
    more = row("d", "b.wav#t=0.1,0.5", question("<audio> or <audio>?", "bad.wav"), question("Loud?"))
    write_manifest(tmp_path / "m.jsonl", [*ROWS, more])
    prepare_here(config)
    assert [reject.get("question_id") for reject in rejects(config)] == [None, "lost", "d/0"]
    assert load_contract(config.output).questions == 5 and problems(config) == []


def test_validation_finds_a_conversation_without_its_clip(config, tmp_path):
    prepare_here(config)
    path = tmp_path / "set/rejects.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[0]}\n")
    assert problems(config) == ["clips: question lost names clip bad.wav, which is not in the set"]
    path.write_text(f"{lines[1]}\n{lines[1].replace('lost', 'a/0')}\n")
    assert problems(config) == ["rejects.jsonl: rejects question a/0, whose clips are in the set"]


def test_sets_without_the_column_of_paths_are_read(config, tmp_path):
    prepare_here(config)
    columns = {name: kind for name, kind in CLIP_COLUMNS.items() if name != "audio"}
    with pytest.raises(UserError, match="has columns"):
        MdsReader(f"{config.output}/clips", columns)
    earlier = MdsReader(f"{config.output}/clips", CLIP_COLUMNS)
    assert earlier[0]["audio"].endswith("/a.wav")
    for file in (tmp_path / "set/clips").rglob("index.json"):
        text = file.read_text()
        values = json.loads(text)
        for shard in values["shards"]:
            place = shard["column_names"].index("audio")
            for key in ("column_names", "column_encodings", "column_sizes"):
                del shard[key][place]
        file.write_text(json.dumps(values))
    assert len(MdsReader(f"{config.output}/clips", CLIP_COLUMNS)) == 5


def test_features_of_a_segment_are_those_of_a_file_with_the_same_samples(config, tmp_path):
    soundfile.write(tmp_path / "cut.wav", soundfile.read(tmp_path / "long.wav")[0][24000:36000], 16000)
    write_manifest(tmp_path / "m.jsonl", [*ROWS, row("cut", "cut.wav", question("Loud?"))])
    prepare_here(config)
    store = open_store(config.output)
    features = {}
    for part in store.list("log_mel"):
        if part.startswith("part-"):
            features |= {s["clip_id"]: s["features"] for s in read_partition(store.root / "log_mel" / part)}
    np.testing.assert_array_equal(features["end"], features["cut"])


def test_a_plan_from_before_segments_has_the_same_settings(config):
    prepare_here(config)
    plan = load_plan(open_store(config.output))
    contracts = {name: describe_encoder(encoder) for name, encoder in config.encoders.items()}
    assert "start" not in plan.settings["table"] and column_names(contracts) == ["clips", "log_mel"]
    changed = config.model_copy(update={"table": config.table.model_copy(update={"start": "{from}"})})
    with pytest.raises(UserError, match="other settings"):
        require_same_settings(plan, plan_settings(changed, contracts), config.output)


def test_too_many_rows_that_a_set_cannot_hold_stop_the_run(config, tmp_path):
    turns = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A dog."}]
    rows = [{"messages": turns, "audios": ["a.wav"]}, *({"messages": turns, "tools": [{}]} for _ in range(2))]
    write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(UserError) as error:
        prepare_here(config)
    assert "2 of 3 rows hold what a feature set cannot keep, more than max_reject_fraction 0.5" in str(error.value)
    assert "m.jsonl:2: field 'tools' holds tools" in str(error.value)
    tolerant = config.model_copy(update={"max_reject_fraction": 0.7})
    prepare_here(tolerant)
    assert [reject["reason"] for reject in rejects(config)] == ["unsupported", "unsupported"]
