"""Files that are complete or absent and survive a power cut, and a lock that keeps two processes apart."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import UserError


def atomic_write(path: Path, data: bytes) -> None:
    """Replaces a file in one step; an attempt that fails leaves the previous file untouched."""
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
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Forces a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Holds a lock file. The operating system releases it when this process ends, however that happens.

    Args:
        path: lock file; its folder is created.
        timeout_s: how long to wait for another process; None means forever.

    Raises:
        TimeoutError: another process still holds the lock.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
    except Timeout as error:
        raise TimeoutError(str(path)) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lock_folder(folder: Path, name: str, timeout_s: float = 0.0) -> Iterator[None]:
    """Reserves a folder for this process.

    Args:
        folder: folder to reserve; it is created.
        name: name of the lock file in the folder; `<name>.holder` describes the process that holds it.
        timeout_s: how long to wait for another process.

    Raises:
        UserError: another process still holds the folder.
    """
    holder = folder / f"{name}.holder"
    try:
        with file_lock(folder / name, timeout_s):
            holder.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}",
                encoding="utf-8",
            )
            yield
    except TimeoutError as error:
        owner = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise UserError(folder, f"is in use by {owner}", "wait for it, or choose another output folder") from error
