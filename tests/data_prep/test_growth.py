"""Tests how a finished set grows: new clips, questions and encoders are added without encoding anything twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_prep import prepare, validate
from data_prep.job.encode_clips import ClipEncoder
from data_prep.job.mds_writer import read_partition
from data_prep.job.store import open_store
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import load_contract
from tests.helpers.corpora import clip_row, hashes, prepare_config, prepare_here, tone, write_corpus, write_manifest


@pytest.fixture
def corpus(tmp_path):
    manifest = write_corpus(tmp_path / "corpus", 7)
    (tmp_path / "corpus/audio/4.wav").write_bytes(b"no audio")
    settings = {"partition_clips": 3, "max_reject_fraction": 0.3}
    config = prepare_config(manifest, tmp_path / "set", **settings)
    prepare_here(config)
    return config, [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Ids of the clips that are decoded from now on."""
    clips = []
    decode = ClipEncoder._decode
    monkeypatch.setattr(ClipEncoder, "_decode", lambda self, clip: clips.append(clip.clip_id) or decode(self, clip))
    return clips


def growth_settings(config) -> dict:
    return {"partition_clips": config.partition_clips, "max_reject_fraction": config.max_reject_fraction}


def grow(config, rows, **values):
    """Prepares again with another manifest or more encoders; checks that the set is valid afterwards."""
    manifest = write_manifest(Path(config.manifest), rows)
    grown = prepare_config(manifest, config.output, **growth_settings(config), **values)
    prepare_here(grown)
    assert validate.find_problems(open_store(config.output), load_contract(config.output)) == []
    return grown


def read_column(config, column) -> dict[str, dict]:
    store = open_store(config.output)
    index = json.loads(store.read(f"{column}/index.json"))
    folders = dict.fromkeys(shard["raw_data"]["basename"].split("/")[0] for shard in index["shards"])
    return {s["clip_id"]: s for folder in folders for s in read_partition(store.root / column / folder)}


def test_new_clips_go_to_new_partitions(corpus, encoded, tmp_path):
    config, rows = corpus
    hashes_before = hashes(tmp_path / "set")
    soundfile.write(tmp_path / "corpus/audio/new.wav", tone(0.5, 16000), 16000)
    grow(config, [clip_row("new", "audio/new.wav"), *rows])
    assert encoded == ["new"]
    after = hashes(tmp_path / "set")
    shards = {name for name in hashes_before if "/part-" in name}
    assert shards and all(after[name] == hashes_before[name] for name in shards)
    assert list(read_column(config, "log_mel")) == ["clip0", "clip1", "clip2", "clip3", "clip5", "clip6", "new"]


def test_questions_are_replaced_without_touching_features(corpus, encoded, tmp_path):
    config, rows = corpus
    hashes_before = hashes(tmp_path / "set/log_mel")
    rows[3]["questions"][0]["answer"] = "a flute"
    rows[3]["questions"].append({"question": "And?", "answer": "nothing"})
    grow(config, rows)
    assert encoded == [] and hashes(tmp_path / "set/log_mel") == hashes_before
    clips = read_column(config, "clips")
    assert [q["answer"] for q in clips["clip3"]["questions"]] == ["a flute", "a tone", "nothing"]
    assert load_contract(config.output).questions == 2 * 6 + 1
    assert open_store(config.output).list("clips") == ["index.json", "part-00000", "part-00001-1", "part-00002"]


def test_an_encoder_is_added_beside_the_others(corpus, encoded, tmp_path):
    config, rows = corpus
    hashes_before = {n: h for n, h in hashes(tmp_path / "set").items() if n.startswith(("clips/", "log_mel/"))}
    fine = {"kind": "log_mel", "hop_ms": 5, "num_mels": 40}
    grown = grow(config, rows, encoders={"log_mel": {"kind": "log_mel"}, "fine": fine})
    assert "clip4" not in encoded  # it stays rejected
    assert {n: h for n, h in hashes(tmp_path / "set").items() if n in hashes_before} == hashes_before
    assert list(read_column(grown, "fine")) == list(read_column(grown, "clips"))
    assert read_column(grown, "fine")["clip0"]["features"].shape[1] == 160
    with pytest.raises(UserError, match="other settings"):  # going back would lose a column
        prepare.prepare(config)


def test_a_clip_that_only_the_new_encoder_rejects_is_removed_from_every_column(corpus, tmp_path):
    config, rows = corpus
    (tmp_path / "corpus/audio/1.wav").unlink()  # gone since the first encoder read it
    grown = grow(config, rows, encoders={"log_mel": {"kind": "log_mel"}, "fine": {"kind": "log_mel", "hop_ms": 5}})
    expected = ["clip0", "clip2", "clip3", "clip5", "clip6"]
    for column in ("clips", "log_mel", "fine"):
        assert list(read_column(grown, column)) == expected
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").read_text().splitlines()]
    assert [(r["clip_id"], r["reason"]) for r in rejects] == [("clip1", "missing"), ("clip4", "undecodable")]


def test_clips_cannot_be_removed_or_change_their_audio(corpus):
    config, rows = corpus
    with pytest.raises(UserError, match="holds clip clip2, the manifest does not"):
        grow(config, [row for row in rows if row["clip_id"] != "clip2"])
    rows[2]["audio"] = "audio/3.wav"
    with pytest.raises(UserError, match="holds clip clip2 with other audio"):
        grow(config, rows)


def test_features_are_the_same_as_if_prepared_at_once(corpus, tmp_path):
    config, rows = corpus
    encoders = {"log_mel": {"kind": "log_mel"}, "fine": {"kind": "log_mel", "hop_ms": 5}}
    grown = grow(config, rows, encoders=encoders)
    at_once = prepare_config(Path(config.manifest), tmp_path / "once", **growth_settings(config), encoders=encoders)
    prepare_here(at_once)
    for column in ("log_mel", "fine"):
        ours, theirs = read_column(grown, column), read_column(at_once, column)
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[clip]["features"], theirs[clip]["features"]) for clip in ours)
