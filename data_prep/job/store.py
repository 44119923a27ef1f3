"""Reads and writes the files of a feature set, locally or in an object store; files and folders appear atomically."""

from __future__ import annotations

import contextlib
import filecmp
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from data_prep.files import is_remote
from pipeline.core.files import atomic_write, fsync, lock_folder

SCRATCH = ".tmp"
LOCK = ".lock"


class Store(ABC):
    """A folder or a prefix of an object store; names are relative to it, with slashes."""

    url: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Reads a file.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; None when it does not exist."""

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Returns the sorted names in a folder; empty when it does not exist."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Writes a file atomically."""

    @abstractmethod
    def publish(self, folder: Path, name: str) -> None:
        """Moves a local folder of finished files to `name`, and replaces what another attempt may have left there."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file or a folder with its content, if it exists."""

    @abstractmethod
    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Creates a local scratch folder, which is removed at exit."""

    @abstractmethod
    def fetch(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Provides the files of a folder (not its sub-folders) on the local disk; a copy is removed at exit."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Excludes other preparations of this set, where the store supports it.

        Raises:
            UserError: another preparation holds the lock.
        """


class LocalStore(Store):
    """A folder of a file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(root)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> list[str]:
        path = self.root / folder
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def publish(self, folder: Path, name: str) -> None:
        # An identical folder of another attempt is kept: it may have been committed in the meantime and must not
        # disappear even for a moment.
        target = self.root / name
        for path in folder.iterdir():
            fsync(path)
        fsync(folder)
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
        fsync(target.parent)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        path = self.root / SCRATCH / uuid.uuid4().hex
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        yield self.root / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with lock_folder(self.root, LOCK):
            yield


class RemoteStore(Store):
    """A prefix of an object store, through fsspec; each object appears atomically.

    There is no lock: two simultaneous preparations of the same set waste work and write the same bytes.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._fs, self._root = fsspec.url_to_fs(self.url)

    def read(self, name: str) -> bytes:
        data: bytes = self._fs.cat_file(self._path(name))
        return data

    def size(self, name: str) -> int | None:
        self._fs.invalidate_cache()  # listings are cached, and other processes write
        try:
            size: int = self._fs.info(self._path(name))["size"]
        except FileNotFoundError:
            return None
        return size

    def list(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            names = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[1] for name in names)

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)

    def publish(self, folder: Path, name: str) -> None:
        files = {path.name: path for path in folder.iterdir()}
        for stale in set(self.list(name)) - files.keys():
            self.remove(f"{name}/{stale}")
        for file, path in files.items():
            self._fs.put_file(str(path), self._path(f"{name}/{file}"))

    def remove(self, name: str) -> None:
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as path:
            yield Path(path)

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as path:
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                for entry in self._fs.ls(self._path(name).rstrip("/"), detail=True):
                    if entry["type"] == "file":
                        self._fs.get_file(entry["name"], f"{path}/{entry['name'].rsplit('/', 1)[1]}")
            yield Path(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def open_store(url: str | Path) -> Store:
    """Returns the store of a local path, or of a URL with a scheme."""
    return RemoteStore(str(url)) if is_remote(str(url)) else LocalStore(url)
