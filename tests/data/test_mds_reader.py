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
from pipeline.core.files import file_lock
from pipeline.data.feature_set import FeatureSet
from pipeline.data.mds_reader import MdsReader, copy_file
from tests.helpers.feature_sets import frames_of, write_feature_set

COUNTS = [2] * 12  # six shards of two clips


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_feature_set(tmp_path / "remote", COUNTS, clips_per_shard=2)


def reader(folder: Path, cache: Path, cache_bytes: int | None = None) -> MdsReader:
    return MdsReader(f"{folder}/log_mel", FEATURE_COLUMNS, cache, cache_bytes)


def read(mds_reader: MdsReader, indices: Sequence[int] | None = None) -> None:
    for index in range(len(COUNTS)) if indices is None else indices:
        assert (mds_reader[index]["features"] == frames_of(index, 8)).all()


def copies(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.mds"))


def test_only_shards_that_are_read_are_copied_and_later_jobs_reuse_them(folder, tmp_path):
    cache = tmp_path / "cache"
    read(reader(folder, cache), [0, 1, 6])
    assert len(copies(cache)) == 2
    for shard in (folder / "log_mel").rglob("*.mds"):
        shard.unlink()
    read(reader(folder, cache), [0, 1, 6, 7])
    with pytest.raises(UserError, match=r"remote/log_mel/part-00001/shard\.00000\.mds: cannot be copied"):
        read(reader(folder, cache), [2])


def truncate(data: bytes) -> bytes:
    return data[:-3]


def flip_value(data: bytes) -> bytes:
    """The size stays right, and a value of the first clip's features decodes to another number."""
    position = data.index(frames_of(0, 8).tobytes())
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_value])
def test_a_damaged_copy_is_copied_again(folder, tmp_path, damage):
    cache, source = tmp_path / "cache", folder / "log_mel" / "part-00000" / "shard.00000.mds"
    read(reader(folder, cache), [0])
    (copy,) = copies(cache)
    copy.write_bytes(damage(source.read_bytes()))
    read(reader(folder, cache), [0, 1])
    assert copy.read_bytes() == source.read_bytes()


def test_a_damaged_source_is_named(folder, tmp_path):
    shard = folder / "log_mel" / "part-00000" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{shard}: has another xxh64 hash"):
        read(reader(folder, tmp_path / "cache"), [0])


def test_the_cache_stays_within_its_limit(folder, tmp_path):
    cache, size = tmp_path / "cache", (folder / "log_mel" / "part-00000" / "shard.00000.mds").stat().st_size
    limited = reader(folder, cache, cache_bytes=int(2.5 * size))
    read(limited)
    assert len(copies(cache)) == 2
    read(limited)  # evicted shards are copied again, although they were checked before
    read(reader(folder, cache))


def test_a_shard_that_is_evicted_while_it_is_checked_is_copied_again(folder, tmp_path, monkeypatch):
    utime, evicted = os.utime, []

    def evict_once(path, *args, **kwargs):
        if Path(path).suffix == ".mds" and not evicted:
            evicted.append(path)
            Path(path).unlink()
        utime(path, *args, **kwargs)

    monkeypatch.setattr(os, "utime", evict_once)
    read(reader(folder, tmp_path / "cache"), [0])
    assert evicted == copies(tmp_path / "cache")


def test_a_url_needs_a_cache():
    with pytest.raises(UserError, match=r"set data\.cache"):
        FeatureSet("s3://bucket/set", ["log_mel"])


def test_a_set_read_through_a_cache_equals_the_set_read_in_place(folder, tmp_path):
    local, remote = FeatureSet(folder, ["log_mel"]), FeatureSet(folder, ["log_mel"], tmp_path / "cache")
    assert remote.is_cached and not local.is_cached
    assert (remote.table.characters == local.table.characters).all()
    for index in range(len(local)):
        assert remote.clip(index) == local.clip(index)
        arrays = [this.features(index, f"clip-{index}")["log_mel"] for this in (remote, local)]
        assert np.array_equal(*arrays)


def _read_all(folder: Path, cache: Path) -> None:
    read(reader(folder, cache))


def test_processes_share_a_cache(folder, tmp_path):
    workers = [get_context("fork").Process(target=_read_all, args=(folder, tmp_path / "cache")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(copies(tmp_path / "cache")) == 6


def test_a_worker_forked_while_a_shard_is_copied_does_not_keep_the_lock(folder, tmp_path, monkeypatch):
    import pipeline.data.mds_reader

    workers = []

    def copy_and_fork(source: str, target: Path) -> None:
        if target.suffix == ".mds":
            workers.append(get_context("fork").Process(target=time.sleep, args=(60,)))
            workers[0].start()
        copy_file(source, target)

    monkeypatch.setattr(pipeline.data.mds_reader, "copy_file", copy_and_fork)
    try:
        read(reader(folder, tmp_path / "cache"), [0])
        (copy,) = copies(tmp_path / "cache")
        (lock,) = copy.parent.glob(".*.lock")
        with file_lock(lock, timeout_s=5):
            assert workers[0].is_alive()
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _die_while_copying(folder: Path, cache: Path, copying: Path) -> None:
    import pipeline.data.mds_reader

    def stall(source: str, target: Path) -> None:
        if target.suffix == ".mds":
            target.write_bytes(b"half")
            copying.touch()
            time.sleep(60)
        copy_file(source, target)

    pipeline.data.mds_reader.copy_file = stall
    _read_all(folder, cache)


def test_a_killed_reader_blocks_no_other_and_leaves_no_shared_memory(folder, tmp_path):
    shared_memory = set(Path("/dev/shm").iterdir())
    copying = tmp_path / "copying"
    victim = get_context("fork").Process(target=_die_while_copying, args=(folder, tmp_path / "cache", copying))
    victim.start()
    while not copying.exists():
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    read(reader(folder, tmp_path / "cache"))
    assert not {name for name in set(Path("/dev/shm").iterdir()) - shared_memory if name.name[:6].isdigit()}


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
        remote = FeatureSet("s3://sets/train", ["log_mel"], tmp_path / "cache")
        assert load_contract("s3://sets/train") == remote.contract == load_contract(folder)
        for index in range(len(remote)):
            features = remote.features(index, remote.clip(index).clip_id)
            assert (features["log_mel"] == frames_of(index, 8)).all()
        with pytest.raises(UserError, match=r"s3://sets/other/features\.json: cannot be"):
            FeatureSet("s3://sets/other", ["log_mel"], tmp_path / "cache")
        with pytest.raises(UserError, match=r"s3://sets/other/features\.json: cannot be read"):
            load_contract("s3://sets/other")
    finally:
        server.stop()
