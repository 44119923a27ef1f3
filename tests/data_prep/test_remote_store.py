"""Tests a feature set and its audio in an object store, with a local server of the S3 protocol."""

import os
import shutil

import pytest

from data_prep import validate
from data_prep.job.commits import remove_commit
from data_prep.job.store import open_store
from pipeline.core.errors import run_command
from tests.helpers.corpora import hashes, prepare_config, prepare_here, write_corpus

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    previous = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    import fsspec

    fsspec.filesystem("s3").mkdir("corpora")
    yield "s3://corpora"
    server.stop()
    for name, value in previous.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def corpus(bucket, tmp_path):
    import fsspec

    manifest = write_corpus(tmp_path / "corpus", 5)
    filesystem = fsspec.filesystem("s3")
    filesystem.put(str(tmp_path / "corpus"), "corpora/", recursive=True)
    return manifest


def download(url: str, folder) -> dict[str, str]:
    import fsspec

    shutil.rmtree(folder, ignore_errors=True)
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    filesystem.get(url.removeprefix("s3://"), str(folder), recursive=True)
    return hashes(folder)


def test_features_of_remote_audio_are_those_of_local_audio(bucket, corpus, tmp_path):
    prepare_here(prepare_config(corpus, tmp_path / "local", partition_clips=2))
    prepare_here(prepare_config(f"{bucket}/corpus/manifest.jsonl", tmp_path / "remote", partition_clips=2))
    assert hashes(tmp_path / "remote/log_mel") == hashes(tmp_path / "local/log_mel")


def test_an_object_store_holds_the_same_files_as_a_local_folder(bucket, corpus, tmp_path, capsys):
    manifest = f"{bucket}/corpus/manifest.jsonl"
    prepare_here(prepare_config(manifest, tmp_path / "local", partition_clips=2))
    remote = prepare_config(manifest, f"{bucket}/set", partition_clips=2)
    prepare_here(remote)
    assert download(remote.output, tmp_path / "copy") == hashes(tmp_path / "local")
    assert validate.main([remote.output]) == 0

    store = open_store(remote.output)
    remove_commit(store, 1)  # as after a killed worker: its objects exist, its record does not
    store.write("log_mel/part-00001/shard.00007.mds", b"of another attempt")
    prepare_here(remote)
    assert download(remote.output, tmp_path / "copy") == hashes(tmp_path / "local")

    data = bytearray(store.read("log_mel/part-00000/shard.00000.mds"))
    data[1000] ^= 1
    store.write("log_mel/part-00000/shard.00000.mds", bytes(data))
    assert run_command(validate.main, [remote.output]) == 1
    assert "log_mel/part-00000/shard.00000.mds: does not have the hash" in capsys.readouterr().err
