"""The provenance of a run: its code, its packages and the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.core.units import GIB

_PACKAGES = ("torch", "deepspeed", "transformers", "mosaicml-streaming", "mlflow", "ray", "numpy", "pal-pipeline")


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that determine results, for those that are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, str]:
    """Returns the commit of this code and whether files have changed since; empty outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"git.commit": commit, "git.changed": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def machine() -> str:
    """Returns a short description of this machine: its GPUs or else its processor, its cores and its memory."""
    import psutil
    import torch

    cpus = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    chips = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or cpus[:1]
    names = ", ".join(f"{chips.count(chip)} x {chip}" if len(chips) > 1 else chip for chip in dict.fromkeys(chips))
    gib = psutil.virtual_memory().total / GIB
    return f"{names or platform.machine()}, {psutil.cpu_count()} CPU cores, {gib:.0f} GiB of memory"


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
