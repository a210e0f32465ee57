"""Named states in one file with a version: TorchRL's checkpoint archive, read without running code."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint, CheckpointAdapter, CheckpointError

from iql_torchrl.files import naming

__all__ = [
    "SUFFIX",
    "CheckpointError",
    "StateAdapter",
    "checkpoint_path",
    "component_names",
    "new_checkpoint",
    "newest",
    "read_components",
    "remove_leftovers",
    "replace_by_link",
    "write_components",
]

SUFFIX = ".torchrl"
PREFIX = "checkpoint-"
UNREADABLE: tuple[type[Exception], ...] = (
    CheckpointError,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
)


class StateAdapter(CheckpointAdapter):
    """A ``state_dict`` as one file that is always read with ``weights_only=True``.

    TorchRL's own adapter reads several formats, also pickled objects; this one reads a single
    format. ``format_version`` counts the layouts of this package's states.
    """

    adapter_id = "iql_torchrl.state"
    format_version = 1
    filename = "state.pt"

    def __init__(self) -> None:
        self._read_back = False

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> Any:
        path.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # Python writes the file: it raises OSError on a full disk
        torch.save(component.state_dict(), content)
        if not self._read_back:
            self._check_readable(content, component)
        with content.getbuffer() as written:
            (path / self.filename).write_bytes(written)

    def _check_readable(self, content: io.BytesIO, component: Any) -> None:
        """Raise ``CheckpointError`` for a state that could not be loaded; checked once per run."""
        content.seek(0)
        try:
            torch.load(content, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the state of {type(component).__name__} holds something other than plain data, "
                "so it could not be loaded again: return only numbers, strings, tensors and lists "
                f"or dicts of them from its state_dict. ({_first_line(error)})"
            ) from error
        self._read_back = True

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Any,
        args: Any,
        kwargs: Any,
    ) -> None:
        state = torch.load(path / self.filename, weights_only=True, map_location=map_location)
        load = getattr(component, "load_state_dict", None) or component.check
        load(state)


class _State:
    """Adapter: a state as an object with ``state_dict`` and ``load_state_dict``."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def new_checkpoint() -> Checkpoint:
    """TorchRL's ``Checkpoint``, set to write one file in which every part has a checksum.

    The format and the adapters are ours to choose, so TorchRL's defaults may change.
    """
    return Checkpoint(format="archive")


def write_components(
    path: str | Path, states: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write named states (numbers, strings, tensors, lists and dicts of them) to one file.

    Written to a temporary file that is then renamed, so ``path`` is never incomplete. Raises
    ``OSError`` naming ``path`` where it cannot be written.
    """
    checkpoint = new_checkpoint()
    for name, state in states.items():
        checkpoint.register(name, _State(state), adapter=StateAdapter())
    with naming(Path(path)):
        return checkpoint.save(path, metadata=metadata)


def read_components(path: str | Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """The states ``names`` of a file (all of this package's if None), on the CPU; runs no code.

    Raises ``CheckpointError`` with one sentence: no such file, a truncated or damaged file, a file
    of another version, a missing part, or a part that is not plain data.
    """
    path = Path(path)
    parts = _parts_of(path)
    if names is None:
        names = [n for n, record in parts.items() if record["adapter"] == StateAdapter.adapter_id]
    for name in names:
        _check_record(path, name, parts)
    checkpoint = new_checkpoint()
    states = {name: _State() for name in names}
    for name, state in states.items():
        checkpoint.register(name, state, adapter=StateAdapter())
    try:
        checkpoint.load(path, map_location="cpu")
    except UNREADABLE as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path}: contains something other than plain data and was not loaded, because "
                "loading it could run a program. Use a checkpoint that you or someone you trust "
                f"wrote with this package. ({_first_line(error.__cause__)})"
            ) from error
        raise _damaged(path, error) from error
    return {name: state.state for name, state in states.items()}


def component_names(path: str | Path) -> set[str]:
    """The names of the states in a file. Raises ``CheckpointError`` as :func:`read_components`."""
    return set(_parts_of(Path(path)))


def checkpoint_path(folder: Path, update: int) -> Path:
    """The name that TorchRL's ``CheckpointRotation`` gives the archive of ``update``."""
    return folder / f"{PREFIX}{update:012d}{SUFFIX}"


def newest(folder: str | Path) -> Path:
    """The file of the latest update in a run's ``checkpoints`` folder, by its name.

    Raises ``CheckpointError`` when there is none.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder of checkpoints.")
    files = sorted(folder.glob(f"{PREFIX}*{SUFFIX}")) if folder.is_dir() else []
    if not files:
        raise CheckpointError(f"{folder}: contains no {PREFIX}*{SUFFIX} file.")
    return files[-1]


def remove_leftovers(folder: str | Path) -> None:
    """Delete the incomplete files of a killed process from a folder of checkpoints."""
    for path in Path(folder).glob(f".{PREFIX}*"):
        if any(mark in path.name for mark in (".stage-", ".archive-", ".delete-", ".backup-")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def replace_by_link(source: Path, destination: Path) -> None:
    """Replace ``destination`` by the file ``source``, by a hard link where possible, else a copy."""
    temporary = destination.with_name(f".{destination.name}")
    temporary.unlink(missing_ok=True)
    try:
        with naming(destination):
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def _parts_of(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        manifest = Checkpoint.manifest(path)
    except UNREADABLE as error:
        if "Unsupported" in str(error):
            raise CheckpointError(f"{path}: from another version of TorchRL. {error}") from error
        raise _damaged(path, error) from error
    parts: Mapping[str, Any] = manifest["components"]
    return parts


def _check_record(path: Path, name: str, parts: Mapping[str, Any]) -> None:
    if name not in parts:
        raise CheckpointError(f"{path}: has no part {name!r}; it holds {sorted(parts)}.")
    record = parts[name]
    if record["adapter"] != StateAdapter.adapter_id:
        raise CheckpointError(
            f"{path}: part {name!r} was written by {record['adapter']!r}, not by this package."
        )
    if record["adapter_version"] != StateAdapter.format_version:
        raise CheckpointError(
            f"{path}: from another version of iql_torchrl (layout {record['adapter_version']}, "
            f"this one reads {StateAdapter.format_version}); load it with that version."
        )


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated or damaged ({_first_line(error)}). If the folder has an older "
        "checkpoint, delete this one to continue from the older one."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
