import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import FEATURE_COLUMNS, load_contract
from pipeline.data.feature_set import FeatureSet
from pipeline.data.mds_reader import MdsReader, copy_file
from tests.helpers.feature_sets import frames_of, write_feature_set

COUNTS = [2] * 12  # six shards of two clips


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_feature_set(tmp_path / "far", COUNTS, clips_per_shard=2)


def column(folder: Path, cache: Path, cache_bytes: int | None = None) -> MdsReader:
    return MdsReader(f"{folder}/log_mel", FEATURE_COLUMNS, cache, cache_bytes)


def read(this: MdsReader, indices: Sequence[int] | None = None) -> None:
    for index in range(len(COUNTS)) if indices is None else indices:
        assert (this[index]["features"] == frames_of(index, 8)).all()


def copies(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.mds"))


def test_only_what_is_read_is_copied_and_later_jobs_find_it(folder, tmp_path):
    cache = tmp_path / "cache"
    read(column(folder, cache), [0, 1, 6])
    assert len(copies(cache)) == 2
    for shard in (folder / "log_mel").rglob("*.mds"):
        shard.unlink()
    read(column(folder, cache), [0, 1, 6, 7])
    with pytest.raises(UserError, match=r"far/log_mel/part-00001/shard\.00000\.mds: cannot be copied"):
        read(column(folder, cache), [2])


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_copy_is_copied_again(folder, tmp_path, damage):
    cache = tmp_path / "cache"
    read(column(folder, cache), [0])
    (copy,) = copies(cache)
    copy.write_bytes(damage(copy.read_bytes()))
    read(column(folder, cache), [0])


def test_a_damaged_source_is_named(folder, tmp_path):
    shard = folder / "log_mel" / "part-00000" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{shard}: has another xxh64"):
        read(column(folder, tmp_path / "cache"), [0])


def test_the_cache_keeps_to_its_limit(folder, tmp_path):
    cache, size = tmp_path / "cache", (folder / "log_mel" / "part-00000" / "shard.00000.mds").stat().st_size
    this = column(folder, cache, cache_bytes=int(2.5 * size))
    read(this)
    assert len(copies(cache)) == 2
    read(this)  # what was removed is copied again, although it was checked before
    read(column(folder, cache))


def test_a_url_needs_a_cache():
    with pytest.raises(UserError, match=r"set data\.cache"):
        FeatureSet("s3://bucket/set", ["log_mel"])


def test_a_set_read_through_a_cache_is_the_set(folder, tmp_path):
    near, far = FeatureSet(folder, ["log_mel"]), FeatureSet(folder, ["log_mel"], tmp_path / "cache")
    assert far.is_cached and not near.is_cached
    assert (far.table.characters == near.table.characters).all()
    for index in range(len(near)):
        assert far.clip(index) == near.clip(index)
        read_far, read_near = (this.features(index, f"clip-{index}")["log_mel"] for this in (far, near))
        assert np.array_equal(read_far, read_near)


def _read_all(folder: Path, cache: Path) -> None:
    read(column(folder, cache))


def test_processes_share_a_cache(folder, tmp_path):
    workers = [get_context("fork").Process(target=_read_all, args=(folder, tmp_path / "cache")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(copies(tmp_path / "cache")) == 6


def _die_while_copying(folder: Path, cache: Path, began: Path) -> None:
    import pipeline.data.mds_reader

    def stall(source: str, target: Path) -> None:
        if target.suffix == ".mds":
            target.write_bytes(b"half")
            began.touch()
            time.sleep(60)
        copy_file(source, target)

    pipeline.data.mds_reader.copy_file = stall
    _read_all(folder, cache)


def test_a_killed_reader_blocks_nobody_and_leaves_no_shared_memory(folder, tmp_path):
    before = set(Path("/dev/shm").iterdir())
    began = tmp_path / "began"
    victim = get_context("fork").Process(target=_die_while_copying, args=(folder, tmp_path / "cache", began))
    victim.start()
    while not began.exists():
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    read(column(folder, tmp_path / "cache"))
    assert not {name for name in set(Path("/dev/shm").iterdir()) - before if name.name[:6].isdigit()}


@pytest.mark.slow
def test_an_object_store_is_read_through_the_cache(folder, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("sets")
        store.put(f"{folder}/", "sets/train/", recursive=True)
        far = FeatureSet("s3://sets/train", ["log_mel"], tmp_path / "cache")
        assert load_contract("s3://sets/train") == far.contract == load_contract(folder)
        for index in range(len(far)):
            features = far.features(index, far.clip(index).clip_id)
            assert (features["log_mel"] == frames_of(index, 8)).all()
        with pytest.raises(UserError, match=r"s3://sets/other/features\.json: cannot be"):
            FeatureSet("s3://sets/other", ["log_mel"], tmp_path / "cache")
        with pytest.raises(UserError, match=r"s3://sets/other/features\.json: cannot be read"):
            load_contract("s3://sets/other")
    finally:
        server.stop()
