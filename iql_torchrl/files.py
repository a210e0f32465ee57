"""Writing files completely or not at all, with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

__all__ = ["leads_below", "naming", "whole_file"]


def leads_below(name: str) -> bool:
    """Whether ``name``, which a file gives, is a path below the folder that it is joined to.

    Not where it is absolute, empty, or contains ``..`` or a backslash. Links are not followed.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or PureWindowsPath(name).drive or "\\" in name
    return not outside and ".." not in path.parts and bool(path.parts)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` when the block ends.

    The temporary file is in the same folder. It is renamed to ``path`` if the block ends without
    an exception, and deleted otherwise, so that ``path`` is never incomplete.

    Raises ``OSError`` naming ``path`` where it cannot be written, as on a full disk; the previous
    content of ``path`` then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path, instead_of=temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Add ``path`` to an ``OSError`` of the block that names no file, or names ``instead_of``.

    Writing to a full disk raises an ``OSError`` without a file name.
    """
    try:
        yield
    except OSError as error:
        other_file = error.filename is not None and str(error.filename) != str(instead_of)
        if error.errno is None or other_file:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
