"""Built tables on disk: written to a temporary folder, renamed when complete, reused while valid."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from iql_torchrl.data.build import TABLE, Built, build, table_bytes
from iql_torchrl.data.built_folder import (
    RECORD,
    file_sizes,
    read_table,
    write_record,
)
from iql_torchrl.data.locks import folder_lock
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.data.table_record import Description, describe, described

__all__ = ["fingerprint", "load_or_build", "staged_folder"]


#: A file up to this size is digested completely; of a larger one BLOCKS blocks of BLOCK bytes are. Many
#: files share these numbers.
WHOLE = 16 * 2**20
BLOCK = 64 * 2**10
BLOCKS = 64
#: Errors of a full disk, or of a full quota.
FULL = (errno.ENOSPC, errno.EDQUOT)


def fingerprint(files: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a built table depends on: size, time and content of each file, and the options.

    The content is a 128-bit BLAKE2b digest. A file larger than 16 MiB is sampled: 64 blocks of
    64 KiB, the first and the last of them at its ends and the others evenly between, so that a
    file of any size is digested in milliseconds. A change between the blocks of such a file is
    noticed by size and time only. Where there are n files, each gets an n-th of both numbers, but
    at least one block and 3 blocks.

    Without ``files`` (data in memory) a built table is never reused.
    """
    records = [
        [str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns, _digest(p, len(files))]
        for p in files
    ]
    return {"format": 2, "files": records, "options": {k: repr(v) for k, v in options.items()}}


def _digest(path: Path, files: int) -> str:
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        if size <= max(WHOLE // files, BLOCK):
            digest.update(file.readall())
        else:
            blocks = max(BLOCKS // files, 3)
            for number in range(blocks):
                file.seek((size - BLOCK) * number // (blocks - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def load_built(folder: Path, expected: Mapping[str, Any]) -> tuple[Built, Description] | None:
    """The table in ``folder`` if it was built from the same files with the same options.

    Its description is returned too, so that the source need not be opened. None where there is
    nothing, a table of this package that no longer matches, or a table of which a file has another
    size than when it was built. Raises ``DatasetError`` where the folder contains anything else,
    which is never overwritten.
    """
    if not folder.exists():
        return None
    record = folder / RECORD
    if not record.is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            return None
        raise DatasetError(
            f"memmap={folder}: exists and was not made by load_dataset; choose another path."
        )
    try:
        saved = json.loads(record.read_text())
        if not expected.get("files") or saved["fingerprint"] != expected:
            return None
        if saved["sizes"] != file_sizes(folder / TABLE):
            return None
        return read_table(folder, saved), described(saved)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError):
        return None  # Written by another version, or damaged: it is built again.


def load_or_build(
    open_source: Callable[[], Source], folder: Path, expected: Mapping[str, Any], **options: Any
) -> tuple[Built, Description]:
    """``load_built``, or else ``build_cached`` of the source that ``open_source`` returns.

    ``options`` go to ``build``. Other processes and threads that use the folder wait meanwhile (see
    ``folder_lock``), so that they cannot replace the table before it is returned.
    """
    if folder.exists():
        with folder_lock(folder, shared=True):
            if (loaded := load_built(folder, expected)) is not None:
                return loaded
    source = open_source()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        return load_built(folder, expected) or build_cached(source, folder, expected, **options)


def build_cached(
    source: Source, folder: Path, expected: Mapping[str, Any], **options: Any
) -> tuple[Built, Description]:
    """``build`` into a temporary folder beside ``folder``, renamed to it when complete.

    Raises ``DatasetError`` with the needed and the free space where the disk is or becomes full.
    """
    with staged_folder(folder, table_bytes(source, options["dtype"])) as staging:
        built = build(source, folder=staging / TABLE, **options)
        write_record(staging, built, source, expected)
    built.transitions = TensorDict.load_memmap(folder / TABLE)
    return built, describe(source)


@contextmanager
def staged_folder(folder: Path, needed: int, option: str = "memmap") -> Iterator[Path]:
    """A temporary folder beside ``folder``, renamed to it when the block ends without an error.

    Raises ``DatasetError`` with the needed and the free space where the disk is or becomes full;
    ``option`` is the name of the argument that named the folder.
    """
    try:
        if needed > shutil.disk_usage(folder.absolute().parent).free:
            raise _full(folder, needed, "nothing was written", option)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield staging
            _swap(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"{error.strerror} while writing it"
        raise _full(folder, needed, reason, option) from error


def _full(folder: Path, needed: int, reason: str, option: str) -> DatasetError:
    place = next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    return DatasetError(
        f"{option}={folder}: the table needs {needed:,} bytes and {free:,} are free on the disk of "
        f"{place} ({reason}). Make room, choose a folder on another disk, or read less with "
        "limit=. A table that exists already stays until the new one is complete."
    )


def _swap(new: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.rename(folder, old / "table")
    try:
        os.rename(new, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise DatasetError(
            f"memmap={folder}: another process put a table there while this one was built, and the "
            "file system offers no locks to prevent it. Load it again, or use one folder per process."
        ) from error
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
