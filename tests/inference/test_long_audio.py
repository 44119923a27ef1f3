"""Time grows linearly from one hour of audio to three, memory as documented; of a stream a bounded part is kept."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.helpers.exported_models import write_model

MIB = 2**20
LAYERS, HEADS, HEAD_DIM, NUMBER = 4, 4, 32, 4  # sizes of the model; bytes of a float32
FRAME_HZ, WIDTH = 25, 256  # frame rate and width of the encoder
CACHE_MIB_AN_HOUR = 3600 * FRAME_HZ * LAYERS * 2 * HEADS * HEAD_DIM * NUMBER / MIB
# See `PrefixCache.nbytes`: features as float16 and float32, tokens, and the activations of one layer.
TEMPORARY_MIB_AN_HOUR = 3600 * FRAME_HZ * (WIDTH * (2 + 4) + (1 + 8) * HEADS * HEAD_DIM * NUMBER) / MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": HEADS * HEAD_DIM, "num_layers": LAYERS, "num_heads": HEADS, "num_key_value_heads": HEADS}
    return write_model(tmp_path_factory.mktemp("long"), "lal", **sizes) / "model"


@dataclass(frozen=True)
class Usage:
    """Processor time, peak resident memory and figures of one `pal ask`."""

    cpu_s: float
    peak_mib: float
    figures: dict


def ask(model: Path, clip: Path, *, streaming: bool) -> Usage:
    file = clip.with_suffix(".json")
    command = [sys.executable, "-m", "pipeline.ask", str(model), "-" if streaming else str(clip), "What is it?"]
    command += ["--max-new-tokens=4", f"--json={file}", *(["--every-s=600"] if streaming else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with clip.open("rb") as audio:
        process = subprocess.Popen(command, stdin=audio, stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, json.loads(file.read_text()))


def record(file: Path, hours: float) -> Path:
    block = (np.random.default_rng(0).normal(0, 0.1, 60 * 16000) * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)
    with soundfile.SoundFile(file, "w", 16000, 1, "PCM_16") as audio:
        for _ in range(round(60 * hours)):
            audio.write(block)
    return file


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("streaming", [False, True])
def test_three_hours_cost_three_times_one_hour(model: Path, tmp_path: Path, streaming: bool) -> None:
    minute, one, three = (ask(model, record(tmp_path / f"{h}.wav", h), streaming=streaming) for h in (1 / 60, 1, 3))
    start_s = minute.cpu_s
    ratio = (three.cpu_s - start_s) / (one.cpu_s - start_s)
    hours_s = f"{one.cpu_s - start_s:.1f} s, {three.cpu_s - start_s:.1f} s"
    print(f"\nstreaming: {streaming}; processor time {hours_s}: x{ratio:.2f}")
    for name, run in (("a minute", minute), ("an hour", one), ("three hours", three)):
        print(f"{name}: cache {run.figures['audio_cache_mib']:.1f} MiB, peak {run.peak_mib:.0f} MiB")
    assert ratio == pytest.approx(3, rel=0.15)
    growth_mib = three.peak_mib - one.peak_mib
    print(f"two hours more: {growth_mib:.0f} MiB, of which cache {2 * CACHE_MIB_AN_HOUR * (not streaming):.0f}")
    if streaming:
        assert one.figures["audio_cache_mib"] == three.figures["audio_cache_mib"] == CACHE_MIB_AN_HOUR / 6
        assert growth_mib < 40
    else:
        text_mib = LAYERS * 2 * HEADS * HEAD_DIM * NUMBER * 100 / MIB  # the prompt has fewer tokens
        assert three.figures["audio_cache_mib"] == pytest.approx(3 * CACHE_MIB_AN_HOUR, abs=text_mib)
        assert 2 * CACHE_MIB_AN_HOUR < growth_mib < 2 * (CACHE_MIB_AN_HOUR + TEMPORARY_MIB_AN_HOUR)
