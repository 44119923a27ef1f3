"""Where a run came from: code, packages, and the settings that make it this run and no other."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig

_PACKAGES = ("torch", "deepspeed", "transformers", "mosaicml-streaming", "mlflow", "ray", "numpy", "pal-pipeline")
# Settings that may differ between two starts of one run: they change how it is watched, kept or fed, not what it is.
_FREE = (
    "output",
    "starts_from",
    "tracking",
    "data.cache",
    "data.cache_gib",
    "data.workers",
    "train.checkpoint",
    "train.collective_timeout_s",
    "train.evaluate_every_steps",
    "train.log_every_steps",
    "train.max_skipped_steps",
    "train.peak_tflops",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str]:
    """Commit of this code and whether files were changed since; empty outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"git.commit": commit, "git.changed": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def machine() -> str:
    """This machine in a few words: its GPUs or else its processor, its cores and its memory."""
    import psutil
    import torch

    cpus = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    chips = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or cpus[:1]
    names = ", ".join(f"{chips.count(chip)} x {chip}" if len(chips) > 1 else chip for chip in dict.fromkeys(chips))
    gib = psutil.virtual_memory().total / 2**30
    return f"{names or platform.machine()}, {psutil.cpu_count()} CPU cores, {gib:.0f} GiB of memory"


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def run_identity(config: ExperimentConfig, fingerprint: str, origin: str | None) -> dict[str, Any]:
    """Flat settings that change what a run computes.

    Args:
        fingerprint: of the features that it is trained on.
        origin: identity of the run that it starts from.
    """
    values = flatten(config.model_dump(mode="json"))
    kept = {k: v for k, v in values.items() if not any(k == f or k.startswith(f"{f}.") for f in _FREE)}
    return {**kept, "features.fingerprint": fingerprint, "origin": origin}


def short_value(value: object) -> str:
    """A setting's value as a label: of a path its last part, a fraction as it is."""
    text = str(value)
    return text if re.fullmatch(r"\d+/\d+", text) else text.rpartition("/")[2]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c` keys; lists stay values."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            pairs |= flatten(value, f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = value
    return pairs
