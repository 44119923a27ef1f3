"""Where a feature set lies. Everything becomes visible by one atomic act: a file, or a folder of finished files."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError

SCRATCH = ".tmp"
LOCK = ".lock"


class LocalStore:
    """A folder. Names are relative to it, with slashes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when there is no such file."""
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> list[str]:
        """Names inside a folder, sorted; empty when there is no folder."""
        path = self.root / folder
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def write(self, name: str, data: bytes) -> None:
        """Writes a file so that a reader sees all of it or nothing, also after a power cut."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync(path.parent)

    def publish(self, folder: Path, name: str) -> None:
        """Moves a folder of finished files to `name`.

        What another attempt left there is kept when it is the same, byte by byte, and replaced otherwise.
        """
        target = self.root / name
        for path in folder.iterdir():
            _fsync(path)
        _fsync(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            names = [path.name for path in folder.iterdir()]
            if sorted(self.list(name)) == sorted(names):
                _, different, failed = filecmp.cmpfiles(folder, target, names, shallow=False)
                if not different and not failed:
                    shutil.rmtree(folder)
                    return
            self.remove(name)
        folder.rename(target)
        _fsync(target.parent)

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all it holds; it may be absent."""
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder of one's own on the same disk, gone afterwards."""
        path = self.root / SCRATCH / uuid.uuid4().hex
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other preparations out; the operating system frees it when this process dies.

        Raises:
            UserError: another preparation is at work here.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(self.root, "another preparation writes here", "wait for it or stop it") from error
            yield


def open_store(url: str | Path) -> LocalStore:
    return LocalStore(url)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
