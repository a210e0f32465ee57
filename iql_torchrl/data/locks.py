"""Locks between processes and threads that use one folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders are used without locks.
    fcntl = None  # type: ignore[assignment]

__all__ = ["folder_lock"]


@contextlib.contextmanager
def folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock ``.<name>.lock`` next to ``folder`` (``fcntl.flock``); waits for it.

    ``shared``: other shared locks may be held at the same time, but no exclusive one. The last
    holder deletes the lock file. Nothing is locked where ``fcntl`` is missing, where the parent of
    the folder is read-only, and on file systems without locks.
    """
    file = _acquire(folder.absolute().parent / f".{folder.name}.lock", shared)
    try:
        yield
    finally:
        if file is not None:
            _release(folder.absolute().parent / f".{folder.name}.lock", file)


def _acquire(path: Path, shared: bool) -> int | None:
    if fcntl is None:
        return None
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError:
            os.close(file)
            return None
        # During the wait the file may have been deleted, and another one created.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _release(path: Path, file: int) -> None:
    try:
        with contextlib.suppress(OSError):  # Others hold the lock, or wait with a shared one.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    finally:
        os.close(file)
