"""Tests that preparation gives the same bytes under SIGKILL at random times of its driver, workers or a whole node."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep import validate
from pipeline.config.loading import dump_config
from tests.helpers.corpora import clip_row, hashes, prepare_config, prepare_here, write_corpus, write_manifest

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


class Chaos:
    """A Ray cluster of two nodes on this machine whose parts are killed at random."""

    def __init__(self, seed: int) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self._second = self._cluster.add_node(**NODE)
        self._random = random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()

    def prepare(self, config_file: Path, wanted_kills: int) -> None:
        """Runs `pal prepare` until it succeeds, again after each death of its driver."""
        while True:
            nodes_lost = self.kills["node"]
            with self.start_driver(config_file) as driver:
                while driver.poll() is None:
                    self._pause(driver)
                    if self.kills.total() < wanted_kills and driver.poll() is None:
                        self._kill_something(driver)
                assert driver.stderr is not None
                if driver.returncode == 0:
                    return
                # On one machine a driver may belong to either node, and dies with it.
                if self.kills["node"] == nodes_lost:
                    assert driver.returncode == -signal.SIGKILL, driver.stderr.read().decode()

    def start_driver(self, config_file: Path) -> subprocess.Popen:
        environment = {**os.environ, "RAY_ADDRESS": self._cluster.address, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "data_prep.prepare", str(config_file)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def lose_all_nodes(self) -> None:
        for node in self._cluster.list_all_nodes():
            _raylet(node).kill()

    def _pause(self, driver: subprocess.Popen) -> None:
        """Waits some seconds, in which workers start (which takes most of the time) or encode."""
        deadline = time.monotonic() + self._random.uniform(0.5, 14)
        while time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.05)

    def _kill_something(self, driver: subprocess.Popen) -> None:
        target = self._random.choice(["driver", "worker", "worker", "node"])
        if target == "driver":
            driver.kill()
        elif target == "worker":
            workers = [p for node in self._cluster.list_all_nodes() for p in _workers(node)]
            if not workers:
                return
            self._random.choice(workers).kill()
        else:
            self._cluster.remove_node(self._second, allow_graceful=False)
            self._second = self._cluster.add_node(**NODE)
        self.kills[target] += 1

    def close(self) -> None:
        self._cluster.shutdown()


def _raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _workers(node) -> list[psutil.Process]:
    """Returns the worker processes of a node: actors and idle ones, but not the agents of Ray, which end the node."""
    workers = []
    for process in _raylet(node).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::") and "Agent" not in title:
            workers.append(process)
    return workers


def write_flawed_corpus(folder: Path, clips: int, seconds: float) -> Path:
    """Writes tones of several rates, every 20th of them not audio, a duplicate and a path that leaves the folder."""
    manifest = write_corpus(folder, clips, seconds)
    for i in range(5, clips, 20):
        (folder / f"audio/{i}.wav").write_bytes(b"no audio")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return write_manifest(manifest, [*rows, rows[0], clip_row("out", "../out.wav")])


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("clips", "seconds", "kills"),
    [pytest.param(60, 2.0, 3, id="short"), pytest.param(400, 8.0, 25, id="long", marks=pytest.mark.slow)],
)
def test_the_set_is_the_same_however_often_it_was_interrupted(tmp_path, clips, seconds, kills):
    manifest = write_flawed_corpus(tmp_path / "corpus", clips, seconds)
    settings = {"partition_clips": 12, "max_reject_fraction": 0.1, "batch_s": 30, "workers": {"max": 2}}
    whole = prepare_config(manifest, tmp_path / "whole", **settings)
    prepare_here(whole)
    ids = [json.loads(line)["clip_id"] for line in manifest.read_text().splitlines()]
    chaos = Chaos(seed=clips)
    started, rounds = time.monotonic(), 0
    try:
        while chaos.kills.total() < kills:
            config = prepare_config(manifest, tmp_path / f"set{rounds}", **settings)
            config_file = tmp_path / f"{rounds}.yaml"
            config_file.write_text(dump_config(config))
            chaos.prepare(config_file, kills)
            rounds += 1
            assert hashes(Path(config.output)) == hashes(tmp_path / "whole")
            assert validate.main([config.output]) == 0
            assert sorted(_prepared(Path(config.output))) == sorted(ids)  # each clip once, each reject once
    finally:
        chaos.close()
    print(f"{dict(chaos.kills)} kills in {rounds} runs of {clips} clips, {time.monotonic() - started:.0f} s")


@pytest.mark.timeout(180)
def test_a_driver_whose_node_is_lost_fails_with_an_error_message(tmp_path):
    config = prepare_config(write_corpus(tmp_path / "corpus", 8, 1.0), tmp_path / "set", workers={"cpus": 64})
    config_file = tmp_path / "prepare.yaml"
    config_file.write_text(dump_config(config))
    chaos = Chaos(seed=0)
    try:
        with chaos.start_driver(config_file) as driver:  # it waits for a worker that fits on no node
            assert driver.stderr is not None
            while b"clips/s" not in driver.stderr.readline():
                pass
            chaos.lose_all_nodes()
            _, errors = driver.communicate()
        assert driver.returncode == 1 and "node left the cluster" in errors.decode()
    finally:
        chaos.close()


def _prepared(root: Path) -> list[str]:
    from data_prep.job.mds_writer import read_partition

    rejects = [json.loads(line)["clip_id"] for line in (root / "rejects.jsonl").read_text().splitlines()]
    folders = sorted(path for path in (root / "clips").iterdir() if path.is_dir())
    return rejects + [sample["clip_id"] for folder in folders for sample in read_partition(folder)]
