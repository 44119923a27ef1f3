"""Tests `pal prepare` on one small local Ray cluster, shared by the module because each start takes seconds."""

import json
import os
import threading
import time

import numpy as np
import psutil
import pytest

from data_prep import prepare, validate
from data_prep.config import PrepareConfig
from data_prep.job.errors import PreparationFailed
from data_prep.job.poison_clips import PartitionTask
from pipeline.config.loading import dump_config, load_config
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command
from tests.helpers.corpora import clip_row, hashes, prepare_config, prepare_here, write_corpus, write_manifest

SLOW_S = 0.5


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose workers open files named `slow` slowly, die on files named `poison` and hang on `hang`."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    def misbehave() -> None:  # local, so that its code is sent to workers, which cannot import the tests
        import soundfile

        class Misbehaving(soundfile.SoundFile):
            def __init__(self, file, *args, **kwargs):
                name = str(file).rpartition("/")[2]
                if "slow" in name:
                    time.sleep(SLOW_S)
                if "poison" in name:
                    os._exit(1)
                if "hang" in name:
                    time.sleep(3600)
                super().__init__(file, *args, **kwargs)

        soundfile.SoundFile = Misbehaving

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"worker_process_setup_hook": misbehave},
    )
    yield
    ray.shutdown()


def write_config(config: PrepareConfig, path) -> str:
    path.write_text(dump_config(config))
    return str(path)


def kill_one_worker(after) -> threading.Thread:
    """Sends SIGKILL to an actor of this test's cluster as soon as the file `after` exists."""

    def kill() -> None:
        while not after.exists():
            time.sleep(0.01)
        actors = [
            p for p in psutil.Process().children(recursive=True) if "ray::_ExtractionActor" in " ".join(p.cmdline())
        ]
        actors[0].kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_a_run_with_a_killed_worker_gives_the_same_bytes_as_an_undisturbed_run(cluster, tmp_path, caplog):
    manifest = write_corpus(tmp_path / "corpus", 12)
    for i in (7, 8):
        (tmp_path / f"corpus/audio/{i}.wav").rename(tmp_path / f"corpus/audio/{i}slow.wav")
    (tmp_path / "corpus/audio/10.wav").write_bytes(b"no audio")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i in (7, 8):
        rows[i]["audio"] = f"audio/{i}slow.wav"
    write_manifest(manifest, [*rows, rows[3], clip_row("out", "../../x.wav")])
    settings = {"partition_clips": 5, "max_reject_fraction": 0.5, "workers": {"max": 1}}
    whole = prepare_config(manifest, tmp_path / "whole", **settings)
    prepare_here(whole)

    config = prepare_config(manifest, tmp_path / "set", **settings)
    argv = [write_config(config, tmp_path / "p.yaml"), "--json", str(tmp_path / "out.json")]
    killer = kill_one_worker(tmp_path / "set/commits/00000.json")
    assert prepare.main(argv) == 0
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
    assert "rejects.jsonl has 3 entries: 1 duplicate_id, 1 outside_root, 1 undecodable" in caplog.text
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {k: figures[k] for k in ("clips", "written", "rejected")} == {"clips": 14, "written": 11, "rejected": 3}
    assert figures.keys() >= {"audio_hours", "wall_s", "clips_per_s", "bytes", "fingerprint"}
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").read_text().splitlines()]
    assert [(r["clip_id"], r["reason"]) for r in rejects] == [
        ("clip3", "duplicate_id"),
        ("out", "outside_root"),
        ("clip10", "undecodable"),
    ]
    assert validate.main([str(tmp_path / "set")]) == 0

    hashes_before = hashes(tmp_path / "set")
    assert (
        prepare.main([*argv, "workers.start_timeout_s=0.001"]) == 0
    )  # no worker is started when nothing is left to do
    assert hashes(tmp_path / "set") == hashes_before
    with pytest.raises(UserError, match="other settings"):
        prepare.main([*argv, "encoders.log_mel.num_mels=32"])
    write_manifest(manifest, rows[:-1])
    with pytest.raises(UserError, match=r"holds clip \w+, the manifest does not"):
        prepare.main(argv)


@pytest.mark.slow
def test_a_clip_that_kills_its_worker_is_rejected_and_the_others_are_written(cluster, tmp_path):
    manifest = write_corpus(tmp_path / "corpus", 6)
    (tmp_path / "corpus/audio/2.wav").rename(tmp_path / "corpus/audio/poison.wav")
    manifest.write_text(manifest.read_text().replace("audio/2.wav", "audio/poison.wav"))
    config = prepare_config(manifest, tmp_path / "set", max_attempts=2, max_reject_fraction=0.5, workers={"max": 1})
    assert prepare.prepare(config)["written"] == 5
    (reject,) = (tmp_path / "set/rejects.jsonl").read_text().splitlines()
    assert json.loads(reject) == {
        "clip_id": "clip2",
        "reason": "killed_worker",
        "detail": "killed its worker in 2 of 2 attempts",
        "audio": "audio/poison.wav",
    }
    assert validate.main([str(tmp_path / "set")]) == 0


@pytest.mark.slow
def test_a_clip_that_hangs_its_worker_is_rejected(cluster, tmp_path):
    manifest = write_corpus(tmp_path / "corpus", 3)
    (tmp_path / "corpus/audio/1.wav").rename(tmp_path / "corpus/audio/hang.wav")
    manifest.write_text(manifest.read_text().replace("audio/1.wav", "audio/hang.wav"))
    workers = {"max": 1, "stall_timeout_s": 5}
    config = prepare_config(manifest, tmp_path / "set", max_attempts=1, max_reject_fraction=0.5, workers=workers)
    assert prepare.prepare(config)["written"] == 2
    assert '"clip_id":"clip1","reason":"killed_worker"' in (tmp_path / "set/rejects.jsonl").read_text()


def test_workers_that_never_start_are_reported(cluster, tmp_path):
    manifest = write_corpus(tmp_path / "corpus", 1)
    config = prepare_config(manifest, tmp_path / "set", workers={"cpus": 99, "start_timeout_s": 0.5})
    with pytest.raises(PreparationFailed, match=r"0 of workers\.min 1 .* cannot place 99\.0 CPUs"):
        prepare.prepare(config)


def test_attempts_are_counted_for_the_clip_that_was_alone():
    task = PartitionTask(0, clips=8, position=4)
    task.on_worker_death(max_attempts=2)
    assert task.probe is None  # a first death may be a lost machine
    task.on_worker_death(max_attempts=2)
    assert task.probe == 4  # after a second one the clips are tried alone
    task.on_probe_success()
    task.on_probe_success()
    assert task.probe == 6
    task.on_worker_death(max_attempts=2)
    assert (task.probe, task.poison_clips) == (6, {})
    task.on_worker_death(max_attempts=2)
    assert (task.probe, list(task.poison_clips)) == (None, [6])


def test_progress_resets_the_count_of_deaths_and_the_last_probe_ends_the_search():
    task = PartitionTask(0, clips=8)
    task.on_worker_death(max_attempts=2)
    task.on_progress(8)
    task.on_worker_death(max_attempts=2)
    task.on_worker_death(max_attempts=2)
    assert task.probe is None  # no clip is left to try alone
    task = PartitionTask(0, clips=8)
    task.on_worker_death(max_attempts=2)
    task.on_progress(3)
    assert (task.position, task.worker_deaths) == (3, 0)
    task.probe = 7
    task.on_probe_success()
    assert task.probe is None


def test_a_partition_that_dies_without_a_poison_clip_ends_the_run():
    task = PartitionTask(0, clips=8)
    with pytest.raises(PreparationFailed, match="lower batch_s"):
        for _ in range(4):
            task.on_worker_death(max_attempts=2)
            task.probe = None  # every clip alone succeeded


def test_missing_audio_is_a_user_error_before_any_work_starts(tmp_path):
    manifest = write_corpus(tmp_path / "corpus", 3)
    (tmp_path / "corpus/audio/1.wav").unlink()
    config = write_config(prepare_config(manifest, tmp_path / "set"), tmp_path / "p.yaml")
    with pytest.raises(UserError, match=r"1 of 3 audio paths do not exist, for example .*audio/1\.wav"):
        prepare.main([config])
    assert not (tmp_path / "set/commits").exists()


def test_too_many_rejects_fail_the_run_and_name_the_most_frequent_reason(tmp_path, capsys):
    manifest = write_corpus(tmp_path / "corpus", 4)
    for i in range(2):
        (tmp_path / f"corpus/audio/{i}.wav").write_bytes(b"no audio")
    config = prepare_config(manifest, tmp_path / "set", max_reject_fraction=0.25)
    with pytest.raises(PreparationFailed, match=r"2 of 4 clips rejected.*2 undecodable; for example clip0"):
        prepare_here(config)
    argv = [write_config(config, tmp_path / "p.yaml")]
    assert run_command(prepare.main, argv) == EXIT_FAILURE  # its partition is committed
    assert "2 undecodable" in capsys.readouterr().err
    assert not (tmp_path / "set/features.json").exists()


def test_dry_run_estimates_the_size_and_writes_nothing(tmp_path, capsys):
    manifest = write_corpus(tmp_path / "corpus", 4, seconds=1.0)
    config = prepare_config(manifest, tmp_path / "set")
    assert prepare.main([write_config(config, tmp_path / "p.yaml"), "--dry-run"]) == 0
    figures = json.loads("{" + capsys.readouterr().out.rpartition("\n{")[2])
    seconds = np.mean([1.0 + 0.05 * i for i in range(4)]) * 4
    assert figures == {
        "clips": 4,
        "audio_hours": pytest.approx(seconds / 3600),
        "bytes": pytest.approx(seconds * 25 * 256 * 2, abs=1),
    }
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["demo_prepare", "openaqa_prepare"])
def test_shipped_configs_are_valid(name):
    config = load_config(PrepareConfig, name)
    assert load_config(PrepareConfig, name, ["workers.max=3"]).workers.max == 3
    assert config.encoders
