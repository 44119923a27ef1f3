"""Tests that training reads what preparation writes, and that both report damaged files by name."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from data_prep import validate
from data_prep.job.mds_writer import read_partition
from data_prep.job.store import open_store
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import load_contract
from pipeline.data.feature_set import FeatureSet
from tests.helpers.corpora import clip_row, prepare_config, prepare_here, write_corpus, write_manifest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    encoders = {"log_mel": {"kind": "log_mel"}, "fine": {"kind": "log_mel", "hop_ms": 5}}
    manifest = write_corpus(folder / "corpus", 9)
    prepare_here(prepare_config(manifest, folder / "set", partition_clips=4, encoders=encoders))
    return folder / "set"


def read_all(root) -> FeatureSet:
    features = FeatureSet(root, ["log_mel", "fine"])
    for index in range(9):
        features.features(index, features.clip(index).clip_id)
    return features


def test_the_reader_finds_every_clip_with_its_features(prepared):
    features = FeatureSet(prepared, ["fine", "log_mel"])
    position = 0
    for part in range(3):
        for name in ("log_mel", "fine"):
            for offset, sample in enumerate(read_partition(prepared / name / f"part-{part:05}")):
                index, clip_id = position + offset, sample["clip_id"]
                assert features.clip(index).clip_id == clip_id
                np.testing.assert_array_equal(features.features(index, clip_id)[name], sample["features"])
        position += offset + 1
    assert len(features.table) == 18


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SHARD = "fine/part-00001/shard.00000.mds"


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda r: flip(r / SHARD), SHARD),
        (lambda r: (r / SHARD).write_bytes((r / SHARD).read_bytes()[:-100]), SHARD),
        (lambda r: (r / SHARD).unlink(), SHARD),
        (lambda r: shutil.copy(r / "log_mel/index.json", r / "fine/index.json"), "fine/"),
    ],
    ids=["flipped_byte", "truncated", "missing", "swapped_index"],
)
def test_validation_and_the_reader_both_find_damage(prepared, tmp_path, damage, name):
    root = tmp_path / "set"
    shutil.copytree(prepared, root)
    damage(root)
    assert any(name in problem for problem in validate.find_problems(open_store(root), load_contract(root)))
    with pytest.raises(UserError) as error:
        read_all(root)
    assert name in str(error.value)


def test_questions_without_audio_become_a_set_without_features(tmp_path):
    rows = [{name: value for name, value in clip_row(f"t{i}", "").items() if name != "audio"} for i in range(5)]
    manifest = write_manifest(tmp_path / "text.jsonl", rows)
    prepare_here(prepare_config(manifest, tmp_path / "set", encoders={}, partition_clips=2))
    assert validate.main([str(tmp_path / "set")]) == 0
    features = FeatureSet(tmp_path / "set", [])
    assert features.is_text and len(features.table) == 10
    assert [features.clip(index).clip_id for index in range(5)] == [f"t{i}" for i in range(5)]


def test_audio_without_an_encoder_is_refused(tmp_path):
    manifest = write_manifest(tmp_path / "text.jsonl", [clip_row("a", "a.wav")])
    with pytest.raises(UserError, match=r"text\.jsonl:1: field 'audio'"):
        prepare_here(prepare_config(manifest, tmp_path / "set", encoders={}))


def test_accepted_clips_with_doubtful_audio_are_listed(tmp_path):
    manifest = write_corpus(tmp_path / "corpus", 3)
    audio = tmp_path / "corpus/audio"
    soundfile.write(audio / "0.wav", np.zeros(16000), 16000)
    data = bytearray((audio / "1.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff" * 4
    (audio / "1.wav").write_bytes(data)
    prepare_here(prepare_config(manifest, tmp_path / "set"))
    warnings = [json.loads(line) for line in (tmp_path / "set/warnings.jsonl").read_text().splitlines()]
    assert [(line["clip_id"], line["warning"]) for line in warnings] == [("clip0", "silent"), ("clip1", "repaired")]
    assert validate.main([str(tmp_path / "set")]) == 0


def test_a_set_without_doubtful_audio_has_no_list_of_it(prepared):
    assert not (prepared / "warnings.jsonl").exists()
