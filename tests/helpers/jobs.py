"""Writes a tiny experiment, and runs training jobs on it through the real command."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import ExperimentConfig
from pipeline.core.ranks import read_ranks
from pipeline.engine import init_process_group
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.tracking.writer import METRICS, read_metrics
from tests.helpers.feature_sets import write_feature_set

LIMIT_S = 240


def write_experiment(folder: Path, *, hidden_size: int = 32, **train: Any) -> Path:
    """Writes features, a language model and a config of 12 steps to `folder`; returns the config file."""
    write_feature_set(folder / "features", [3] * 16)
    write_feature_set(folder / "held_out", [2] * 4)
    texts = [f"Question {n} about clip {c}? answer {c}.{n}" for c in range(16) for n in range(3)]
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_layers": 2, "num_heads": 4}
    save_random_language_model(folder / "language_model", texts, RandomLanguageModel(**sizes, vocab_size=300))
    config = {
        "output": str(folder / "run"),
        "model": {"language_model": str(folder / "language_model"), "integration": "pal_v3"},
        "data": {"train": str(folder / "features"), "validation": str(folder / "held_out"), "system_prompt": "Listen."},
        "train": {
            "steps": 12,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "log_every_steps": 1,
            "checkpoint": {"every_steps": 4, "keep": 2},
            **train,
        },
        "tracking": {"experiment": "tests"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def train_in_process(configs: Iterable[ExperimentConfig]) -> None:
    """Runs experiments one after the other on this rank of `run_on_ranks`, without launching a job for each."""
    import torch

    from pipeline.training.trainer import Trainer

    ranks = read_ranks()
    if not torch.distributed.is_initialized():
        init_process_group(ranks, LIMIT_S)
    for config in configs:
        trainer = Trainer(config, ranks, threading.Event())
        trainer.fit()
        trainer.engine.close()


def start_job(*arguments: object, **variables: object) -> subprocess.Popen[str]:
    """Starts `pal train ARGUMENTS` on CPU with one thread per rank and these environment variables."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", *map(str, arguments)],
        env={
            **environment,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **{k: str(v) for k, v in variables.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(job: subprocess.Popen[str], output: Path) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a job; kills one that hangs and reports the end of its log."""
    try:
        out, err = job.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        log = output / "launcher.log"
        tail = log.read_text(errors="replace")[-3000:] if log.exists() else "(no log)"
        raise AssertionError(f"the job hangs: no end after {LIMIT_S} s. Its log:\n{tail}") from None
    return job.returncode, out, err


def wait_for_step(job: subprocess.Popen[str], output: Path, step: int) -> None:
    """Waits until a running job has recorded `step`."""
    deadline = time.monotonic() + LIMIT_S
    while not (output / METRICS).exists() or not any(s >= step for s, _ in read_metrics(output)):
        assert job.poll() is None, f"the job ended before step {step}: {job.communicate()}"
        assert time.monotonic() < deadline, f"no step {step} after {LIMIT_S} s"
        time.sleep(0.05)
