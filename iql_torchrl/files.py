"""Files and folders that are written completely or not at all; checkpoints, which run no code."""

from __future__ import annotations

import errno
import glob
import io
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from filelock import FileLock, UnixFileLock
from torchrl.checkpoint import Checkpoint, CheckpointAdapter
from torchrl.checkpoint import CheckpointError as CheckpointError

# TorchRL's CheckpointRotation names its archives checkpoint-<twelve digits of the update>.torchrl.
PREFIX, SUFFIX = "checkpoint-", ".torchrl"
#: Numbers of the errors of a full disk.
FULL = (errno.ENOSPC, errno.EDQUOT)
STAGING = "[a-z0-9_]{8}"  # the end of a name that ``tempfile`` makes


def is_safe_relative_path(name: str) -> bool:
    """True if ``name``, read from a file, is a path below the folder that it is joined to.

    False for an empty or absolute path, and for one with ``..`` or a backslash. Links are not followed.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or PureWindowsPath(name).drive or "\\" in name
    return not outside and ".." not in path.parts and bool(path.parts)


def make_folder(
    argument: str, path: Path, *, above: bool = False, error: type[ValueError] = ValueError
) -> None:
    """Make the folder ``path``, or with ``above`` the one in which ``path`` is to be written.

    Raises ``error`` where it cannot be made or written to, with the name of the ``argument`` that gave
    ``path``, what is there, and how to correct it. A full disk raises ``OSError``.
    """
    try:
        folder = path.absolute().parent if above else path
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.stat()  # it must lead somewhere
        tempfile.NamedTemporaryFile(prefix=f".{path.name}", dir=folder).close()
    except (OSError, ValueError) as problem:  # ValueError: a text that no path can be
        number = getattr(problem, "errno", None)
        if number in FULL:
            raise
        reason = str(problem) if number is None else os.strerror(number)
        there = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), path)
        if not there.exists():
            reason = f"{there} is a link that leads nowhere" if there.is_symlink() else reason
        elif not there.is_dir():
            reason = f"{there} is a file"
        raise error(
            f"{argument} is {path}, which cannot be created or written to ({reason}); choose a path "
            "below a folder that exists and that you may write to."
        ) from problem


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` when the block ends.

    The temporary file is in the same folder. It is renamed to ``path`` if the block ends without
    an exception, and deleted otherwise, so that ``path`` is never incomplete.

    Raises ``OSError`` naming ``path`` where it cannot be written, as on a full disk; the previous
    content of ``path`` then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with with_filename(path, instead_of=temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``folder`` that replaces it when the block ends.

    The temporary folder is renamed if the block ends without an exception, and deleted otherwise. Hold
    :func:`folder_lock` where several processes may write to ``folder``.
    """
    parent = folder.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        if folder.exists():
            os.rename(folder, Path(temporary, "old"))
        os.rename(new, folder)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock ``.<name>.lock`` next to ``folder``; other processes and threads wait for it.

    First deletes what a killed :func:`atomic_folder` has left. Nothing is locked or deleted where the
    parent of ``folder`` is read-only, and on a file system without locks.
    """
    path = folder.absolute().parent / f".{folder.name}.lock"
    lock = FileLock(path)
    with suppress(OSError):
        lock.acquire()
    try:
        for left in path.parent.glob(f".{glob.escape(folder.name)}-*") if lock.is_locked else ():
            if re.fullmatch(STAGING, left.name.removeprefix(f".{folder.name}-")):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        # Other locks delete their file. On Unix a process that waits locks a new file: it sees that
        # the one it waited for has no name (filelock 3.25).
        if lock.is_locked and isinstance(lock, UnixFileLock):
            path.unlink(missing_ok=True)
        lock.release()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file; ``default`` without a file. ``ValueError`` for a damaged one."""
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or delete it.") from error


@contextmanager
def with_filename(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
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


def replace_by_link(source: Path, destination: Path) -> None:
    """Replace ``destination`` by the file ``source``, by a hard link where possible, else a copy."""
    with atomic_write(destination) as temporary:
        # of a killed process: perhaps a link to another checkpoint
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


class StateAdapter(CheckpointAdapter):
    """A state as one file that is always read with ``weights_only=True``.

    TorchRL's own adapter reads several formats, also pickled objects; this one reads a single
    format. A component has ``state_dict`` and ``load_state_dict``, or is the state itself; ``load``
    with None returns the state. ``format_version`` counts the layouts of this package's states.
    """

    adapter_id = "iql_torchrl.state"
    format_version = 1
    filename = "state.pt"

    def __init__(self) -> None:
        self._read_back = False

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)
        state = component.state_dict() if hasattr(component, "state_dict") else component
        content = io.BytesIO()  # Python writes the file: it raises OSError on a full disk
        torch.save(state, content)
        if not self._read_back:
            self._check_readable(content, component)
        (path / self.filename).write_bytes(content.getbuffer())

    def _check_readable(self, content: io.BytesIO, component: Any) -> None:
        """Raise ``CheckpointError`` for a state that could not be loaded; checked once per run."""
        content.seek(0)
        try:
            torch.load(content, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the state of {type(component).__name__} holds something other than plain data, "
                "so it could not be loaded again: return only numbers, strings, tensors and lists "
                f"or dicts of them from its state_dict. ({first_line(error)})"
            ) from error
        self._read_back = True

    def load(
        self, component: Any, path: Path, *, map_location: Any, tensor_load_kwargs: Any, args: Any,
        kwargs: Any,
    ) -> Any:  # fmt: skip
        state = torch.load(path / self.filename, weights_only=True, map_location=map_location)
        if component is None:
            return state
        component.load_state_dict(state)
        return None


def write_components(
    path: str | Path, states: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write named states (numbers, strings, tensors, lists and dicts of them) to one file.

    Written to a temporary file that is then renamed, so ``path`` is never incomplete. Raises
    ``OSError`` naming ``path`` where it cannot be written.
    """
    checkpoint = Checkpoint(format="archive")
    for name, state in states.items():
        checkpoint.register(name, state, adapter=StateAdapter())
    with with_filename(Path(path)):
        return checkpoint.save(path, metadata=metadata)


def read_components(path: str | Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """The states ``names`` of a file (all of this package's if None), on the CPU; runs no code.

    Raises ``CheckpointError`` with one sentence: no such file, a truncated or damaged file, a file
    of another version, a missing part, or a part that is not plain data.
    """
    path, parts = Path(path), components(path)
    if names is None:
        names = [n for n, record in parts.items() if record["adapter"] == StateAdapter.adapter_id]
    if missing := sorted(set(names) - set(parts)):
        raise CheckpointError(f"{path}: has no part {missing[0]!r}; it holds {sorted(parts)}.")
    checkpoint = Checkpoint()
    for name in names:
        checkpoint.register(name, None, adapter=StateAdapter())
    try:
        states = checkpoint.load(path, map_location="cpu").values
    except Exception as error:  # a damaged file can raise nearly anything
        raise _unreadable(path, error) from error
    return {name: states.get(name) for name in names}


def components(path: str | Path) -> Mapping[str, Any]:
    """The records of the states in a file, by name; ``CheckpointError`` as :func:`read_components`."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        records: Mapping[str, Any] = Checkpoint.manifest(path)["components"]
    except Exception as error:
        raise _unreadable(path, error) from error
    return records


def newest(folder: str | Path) -> Path:
    """The file of the latest update in a run's ``checkpoints`` folder, by its name.

    Raises ``CheckpointError`` when there is none.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder of checkpoints.")
    files = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))
    if not files:
        raise CheckpointError(f"{folder}: contains no {PREFIX}*{SUFFIX} file.")
    return files[-1]


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """The sentence about a file that TorchRL could not read."""
    cause, line = error.__cause__, first_line(error)
    if isinstance(cause, pickle.UnpicklingError):
        return CheckpointError(
            f"{path}: contains something other than plain data and was not loaded, because loading "
            "it could run a program. Use a checkpoint that you or someone you trust wrote with this "
            f"package. ({first_line(cause)})"
        )
    if "Unsupported" in line:  # the format of the file
        return CheckpointError(f"{path}: from another version of TorchRL. {line}")
    if getattr(error, "result", None) is not None and cause is None:
        return CheckpointError(f"{path}: was not written by this version of iql_torchrl: {line}")
    return CheckpointError(
        f"{path}: truncated or damaged ({line}). If the folder has an older checkpoint, delete this "
        "one to continue from the older one."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
