"""Writes small corpora and prepares feature sets from them in this process, for the tests of data_prep."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_prep.config import PrepareConfig
from data_prep.encoders.build import describe_encoder
from data_prep.job.commits import Commit, read_commit
from data_prep.job.finish import finish_feature_set
from data_prep.job.partitions import load_plan, make_plan, plan_settings
from data_prep.job.store import open_store
from data_prep.prepare import is_complete
from pipeline.config.loading import validate_config

RATES_HZ = (16000, 8000, 22050, 44100)


def tone(seconds: float, rate_hz: int, frequency_hz: float = 440.0, channels: int = 1) -> np.ndarray:
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    mono = 0.3 * np.sin(2 * np.pi * frequency_hz * t) + 0.01 * np.sin(2 * np.pi * 3.3 * frequency_hz * t + 1)
    return np.repeat(mono[:, None], channels, axis=1).astype(np.float32)


def write_corpus(folder: Path, clips: int, seconds: float = 0.4) -> Path:
    """Writes tones of varying rate and length with two questions each; returns the path of their manifest."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i in range(clips):
        rate_hz = RATES_HZ[i % len(RATES_HZ)]
        soundfile.write(folder / f"audio/{i}.wav", tone(seconds + 0.05 * (i % 7), rate_hz, 200 + 10 * i), rate_hz)
        rows.append(clip_row(f"clip{i}", f"audio/{i}.wav"))
    return write_manifest(folder / "manifest.jsonl", rows)


def clip_row(clip_id: str, audio: str) -> dict[str, Any]:
    questions = [
        {"question_id": f"{clip_id}.{task}", "question": f"{task}?", "answer": "a tone", "task": task}
        for task in ("what", "pitch")
    ]
    return {"clip_id": clip_id, "audio": audio, "dataset": "tones", "domain": "sound", "questions": questions}


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare_config(manifest: Path | str | list[Path], output: Path | str, **values: Any) -> PrepareConfig:
    manifests = [str(path) for path in manifest] if isinstance(manifest, list) else str(manifest)
    return validate_config(PrepareConfig, {"manifest": manifests, "output": str(output), **values}, "test")


def prepare_here(config: PrepareConfig) -> list[Commit]:
    """Creates or extends a feature set as `pal prepare` does, but in this process and without Ray."""
    from data_prep.job.extract_partition import PartitionWorker

    contracts = {name: describe_encoder(encoder) for name, encoder in config.encoders.items()}
    store = open_store(config.output)
    plan = make_plan(config, plan_settings(config, contracts), store, load_plan(store))
    worker = PartitionWorker(config, contracts)
    commits = []
    for index, partition in enumerate(plan.partitions):
        commit = read_commit(store, index)
        if commit is None or not is_complete(commit, plan, contracts):
            *_, commit = worker.extract(index, partition, {})
        assert isinstance(commit, Commit)
        commits.append(commit)
    finish_feature_set(config, contracts, plan, commits, store)
    return commits


def hashes(root: Path) -> dict[str, str]:
    """Returns the hash of every visible file of a finished set except the resolved config, which names its folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "prepare.yaml"
    }
