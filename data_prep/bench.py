"""`pal bench prepare`: compares the whole preparation with a bare loop of the encoder on the same cores, in one run.

The bare loop has its inputs in memory: no files, no decoding, no spectrograms, no shards. Both times exclude the start
of the processes and the loading of the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig, WhisperConfig
from data_prep.prepare import prepare
from pipeline.config.loading import validate_config
from pipeline.core.arguments import add_dry_run, add_json, write_results
from pipeline.core.errors import run_command

RATE_HZ, CHANNELS = 44100, 2


DESCRIPTION = "Compare the whole preparation with a bare loop of the encoder on the same cores, in one run."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(prog="pal bench prepare", description=DESCRIPTION)
    parser.add_argument("--clips", type=int, default=64, help="number of clips (default: %(default)s)")
    parser.add_argument("--clip-s", type=float, default=10.0, help="seconds of each clip (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of actors, and of processes of the bare loop")
    add_json(parser)
    add_dry_run(parser, "print what would be measured")
    args = parser.parse_args(argv)
    print(f"{args.clips} FLAC clips of {args.clip_s} s, Whisper base shape, {args.workers} workers of one core each")
    if args.dry_run:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.clips, args.clip_s, args.workers)
    print(json.dumps(results, indent=2))
    write_results(results, args.json)
    return 0


def measure(folder: Path, clips: int, clip_s: float, workers: int) -> dict[str, float]:
    """Measures the bare loop, the preparation and the bare loop again; compares with the mean of the two loops."""
    model = write_whisper_base(folder / "whisper")
    manifest = write_noise(folder / "corpus", clips, clip_s)
    config = validate_config(
        PrepareConfig,
        {
            "manifest": str(manifest),
            "output": str(folder / "set"),
            "encoders": {"whisper": {"kind": "whisper", "model": str(model)}},
            "partition_clips": -(-clips // workers),
            "workers": {"min": workers, "max": workers},
        },
        "bench",
    )
    first_clips_per_s = bare_clips_per_s(config, clips, workers)
    results = prepare(config)
    second_clips_per_s = bare_clips_per_s(config, clips, workers)
    pipeline, encoder = clips / results["work_s"], (first_clips_per_s + second_clips_per_s) / 2
    return {
        "pipeline_clips_per_s": pipeline,
        "encoder_clips_per_s": encoder,
        "ratio": pipeline / encoder,
        "encoder_clips_per_s_before": first_clips_per_s,
        "encoder_clips_per_s_after": second_clips_per_s,
        "pipeline_wall_s": results["wall_s"],
    }


def bare_clips_per_s(config: PrepareConfig, clips: int, workers: int) -> float:
    """Returns windows per second of the encoder alone, on as many processes as there are workers."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers)
    with context.Pool(workers, initializer=_set_barrier, initargs=(ready,)) as pool:
        share = -(-clips // workers)
        seconds = pool.map(_bare_loop, [(config, share)] * workers, chunksize=1)
    return share * workers / max(seconds)


def _set_barrier(ready: Barrier) -> None:
    global _ready  # a barrier can be passed to the processes of a pool only through its initializer
    _ready = ready


def _bare_loop(job: tuple[PrepareConfig, int]) -> float:
    import numpy as np
    import torch

    from data_prep.audio.windows import Window
    from data_prep.encoders.build import build_encoder, describe_encoder

    config, clips = job
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    (whisper,) = config.encoders.values()
    assert isinstance(whisper, WhisperConfig)
    encoder = build_encoder(whisper, describe_encoder(whisper), "cpu")
    audio = np.random.default_rng(0).normal(0, 0.1, encoder.window_samples).astype(np.float32)
    prepared = encoder.prepare(Window(audio, len(audio)))
    batch = max(1, int(config.batch_s * encoder.contract.sample_rate_hz / encoder.window_samples))
    _ready.wait()
    start = time.monotonic()
    for first in range(0, clips, batch):
        inputs = [prepared] * min(batch, clips - first)
        encoder.encode_windows(inputs, [len(audio)] * len(inputs))
    return time.monotonic() - start


def write_whisper_base(folder: Path) -> Path:
    """Writes a model with random weights whose encoder has the shape of Whisper base; returns its folder."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, decoder_layers=1,
        decoder_attention_heads=8, decoder_ffn_dim=64, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def write_noise(folder: Path, clips: int, clip_s: float) -> Path:
    """Writes stereo FLAC files that need resampling, and their manifest; returns its path."""
    import numpy as np
    import soundfile

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(clips):
        audio = random.normal(0, 0.1, (round(clip_s * RATE_HZ), CHANNELS)).astype(np.float32)
        soundfile.write(folder / f"{i}.flac", audio, RATE_HZ)
        rows.append({"clip_id": str(i), "audio": f"{i}.flac", "questions": []})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


_ready: Barrier

if __name__ == "__main__":
    sys.exit(run_command(main))
