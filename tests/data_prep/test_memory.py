"""Tests that preparation keeps one partition and one segment of a file in memory, whatever their number."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from tests.helpers.corpora import prepare_config, write_corpus, write_manifest

WORK = """
import resource, sys
from pipeline.config.loading import load_config
from data_prep.config import PrepareConfig
sys.path.insert(0, sys.argv[2])
from tests.helpers.corpora import prepare_here
prepare_here(load_config(PrepareConfig, sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mib(config, folder, pytestconfig) -> float:
    from pipeline.config.loading import dump_config

    path = folder / f"{hash(config.output)}.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-c", WORK, str(path), str(pytestconfig.rootpath)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path, pytestconfig):
    peaks = []
    for clips in (300, 3000):
        manifest = write_corpus(tmp_path / str(clips), clips, seconds=1.0)
        config = prepare_config(manifest, tmp_path / f"set{clips}", partition_clips=150)
        peaks.append(peak_mib(config, tmp_path, pytestconfig))
    print(f"peak resident memory {peaks[0]:.0f} MiB for 300 clips, {peaks[1]:.0f} MiB for 3000")
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_clip_of_three_hours_takes_little_more_memory_than_one_of_a_minute(tmp_path, pytestconfig):
    """The samples of three hours at 44.1 kHz take 1.9 GB, the stored features 69 MB, of which a few copies exist."""
    peaks = []
    for name, minutes in (("minute", 1), ("hours", 180)):
        block = np.random.default_rng(0).normal(0, 0.1, 60 * 44100).astype(np.float32)
        with soundfile.SoundFile(tmp_path / f"{name}.flac", "w", 44100, 1) as file:
            for _ in range(minutes):
                file.write(block)
        row = {"clip_id": name, "audio": f"{name}.flac", "questions": []}
        manifest = write_manifest(tmp_path / f"{name}.jsonl", [row])
        encoders = {"log_mel": {"kind": "log_mel", "frames_per_token": 2, "hop_ms": 20}}
        peaks.append(peak_mib(prepare_config(manifest, tmp_path / name, encoders=encoders), tmp_path, pytestconfig))
    print(f"peak resident memory {peaks[0]:.0f} MiB for a minute, {peaks[1]:.0f} MiB for three hours")
    assert peaks[1] - peaks[0] < 600
