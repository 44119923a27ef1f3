"""The provenance of a run: its code, its packages and the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.core.units import GIB

_SAMPLE_BYTES = 1 << 16
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


def language_model_identity(name: str) -> dict[str, str]:
    """Returns `language_model`, the folder that a name or path stands for, and `language_model_hash` of its content.

    The hash covers the content of `config.json` and of the index of the weights, and of each file of weights its name,
    its size and samples of 64 KiB, so that it costs no time and yet differs between models of one shape. A name on the
    Hub stands for its newest folder in the local cache; without one there is no hash.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            return {"language_model": name}
        folder = Path(cached).parent
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name == "config.json" or file.name.endswith(".index.json"):
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                for position in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                    stream.seek(position)
                    digest.update(stream.read(_SAMPLE_BYTES))
    return {"language_model": str(folder.resolve()), "language_model_hash": digest.hexdigest()[:16]}


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
