import json
import shutil

import numpy as np
import pytest
from streaming.base.util import merge_index

from data_prep.job import mds_writer
from data_prep.job.commits import INDEX, merged_index, read_commit, remove_uncommitted
from data_prep.job.mds_writer import MdsWriter, hash_file, read_partition
from data_prep.job.store import LocalStore
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import FEATURE_COLUMNS
from tests.helpers.corpora import hashes, prepare_config, prepare_here, write_corpus


def sample(i: int) -> dict:
    return {"clip_id": f"c{i}", "features": np.full((i + 1, 3), i, np.float16)}


def test_samples_come_back_in_order_with_their_hashes(tmp_path):
    writer = MdsWriter(tmp_path / "p", FEATURE_COLUMNS)
    for i in range(5):
        writer.write(sample(i))
    files = writer.finish()
    assert [s["clip_id"] for s in read_partition(tmp_path / "p")] == [f"c{i}" for i in range(5)]
    assert all(
        np.array_equal(s["features"], sample(i)["features"]) for i, s in enumerate(read_partition(tmp_path / "p"))
    )
    assert files == [hash_file(path) for path in sorted((tmp_path / "p").iterdir())]
    index = json.loads((tmp_path / "p" / INDEX).read_text())
    assert index["shards"][0]["raw_data"]["hashes"]["xxh64"] == next(f for f in files if f.name != INDEX).xxh64


def test_a_sample_above_the_shard_size_leaves_no_empty_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(mds_writer, "SHARD_BYTES", 2000)
    writer = MdsWriter(tmp_path / "p", FEATURE_COLUMNS)
    for rows in (1000, 2, 1000):
        writer.write({"clip_id": str(rows), "features": np.ones((rows, 3), np.float16)})
    writer.finish()
    index = json.loads((tmp_path / "p" / INDEX).read_text())
    assert [shard["samples"] for shard in index["shards"]] == [1, 1, 1]
    assert len(list(read_partition(tmp_path / "p"))) == 3


def test_an_abandoned_partition_has_no_index(tmp_path):
    writer = MdsWriter(tmp_path / "p", FEATURE_COLUMNS)
    writer.write(sample(0))
    writer.abandon()
    assert not (tmp_path / "p" / INDEX).exists()


@pytest.fixture
def prepared(tmp_path):
    config = prepare_config(write_corpus(tmp_path / "corpus", 7), tmp_path / "set", partition_clips=3)
    return LocalStore(tmp_path / "set"), prepare_here(config), config


def test_the_merged_index_equals_that_of_the_library(prepared, tmp_path):
    store, commits, _ = prepared
    shutil.copytree(store.root / "log_mel", tmp_path / "copy")
    (tmp_path / "copy" / INDEX).unlink()
    merge_index([str(tmp_path / f"copy/part-{i:05}/{INDEX}") for i in range(3)], str(tmp_path / "copy"))
    assert json.loads(merged_index(store, "log_mel", commits)) == json.loads((tmp_path / "copy" / INDEX).read_text())


def test_uncommitted_folders_are_removed_and_written_again_with_the_same_bytes(prepared):
    store, commits, config = prepared
    hashes_before = hashes(store.root)
    (store.root / "commits/00001.json").unlink()  # as if killed between the last folder and the record
    shutil.rmtree(store.root / "clips/part-00001")
    (store.root / "log_mel/part-00002/shard.00000.mds").unlink()  # a record with a missing file is not a commit
    assert [read_commit(store, i) is not None for i in range(3)] == [True, False, False]
    remove_uncommitted(store, ["clips", "log_mel"], commits[:1], keep_indexed=False)
    assert store.list("log_mel") == [INDEX, "part-00000"] and store.list("clips") == [INDEX, "part-00000"]
    prepare_here(config)
    assert hashes(store.root) == hashes_before


def test_publishing_twice_keeps_one_and_replaces_what_differs(tmp_path):
    store = LocalStore(tmp_path / "store")
    for text in ("first", "first", "second"):
        with store.scratch() as scratch:
            (scratch / "column").mkdir()
            (scratch / "column/file").write_text(text)
            store.publish(scratch / "column", "column/part-00000")
        assert store.read("column/part-00000/file") == text.encode()
    assert store.list("column") == ["part-00000"] and store.list(".tmp") == []


def test_two_preparations_cannot_write_to_one_folder(tmp_path):
    first, second = LocalStore(tmp_path).lock(), LocalStore(tmp_path).lock()
    with first, pytest.raises(UserError, match="is in use by process"), second:
        pass
    with LocalStore(tmp_path).lock():
        pass
