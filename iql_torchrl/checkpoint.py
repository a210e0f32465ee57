"""One versioned file of named states: TorchRL's checkpoint archive, with payloads that run no code."""

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

from iql_torchrl.host import remove_path
from iql_torchrl.records import naming

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
    """A ``state_dict`` as one file that is only ever read with ``weights_only=True``.

    TorchRL's own adapter would follow whatever form a file has, pickled objects included; this
    one has a single form. ``format_version`` counts the layouts of this package's states.
    """

    adapter_id = "iql_torchrl.state"
    format_version = 1
    filename = "state.pt"

    def __init__(self) -> None:
        self._read_back = False

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> Any:
        path.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # written by Python, which says so when a disk is full
        torch.save(component.state_dict(), content)
        if not self._read_back:
            self._check_readable(content, component)
        (path / self.filename).write_bytes(content.getbuffer())

    def _check_readable(self, content: io.BytesIO, component: Any) -> None:
        """Once per run: what could never be loaded is refused when it is first saved."""
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
        component.load_state_dict(state)


class _State:
    """A state in hand, in the clothes of an object that has one."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def new_checkpoint() -> Checkpoint:
    """TorchRL's coordinator, set to write one file whose parts carry checksums."""
    return Checkpoint(format="archive")


def write_components(
    path: str | Path, states: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write named states (numbers, strings, tensors, lists and dicts of them) to one file.

    Written beside ``path`` and then renamed: ``path`` is whole, old or new, at every moment. Raises
    ``OSError`` naming ``path`` where it cannot be written.
    """
    checkpoint = new_checkpoint()
    for name, state in states.items():
        checkpoint.register(name, _State(state), adapter=StateAdapter())
    with naming(Path(path)):
        return checkpoint.save(path, metadata=metadata)


def read_components(path: str | Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """The states ``names`` of a file (all of this package's if None), on the CPU; runs no code.

    Raises ``CheckpointError`` with one sentence: no such file, a truncated or damaged file,
    another version's, a missing part, or a part that is no plain data.
    """
    path = Path(path)
    records = _records(path)
    if names is None:
        names = [n for n, record in records.items() if record["adapter"] == StateAdapter.adapter_id]
    for name in names:
        _check_record(path, name, records)
    checkpoint = Checkpoint()
    holders = {name: _State() for name in names}
    for name, holder in holders.items():
        checkpoint.register(name, holder, adapter=StateAdapter())
    try:
        checkpoint.load(path, map_location="cpu")
    except UNREADABLE as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path}: holds something other than plain data and was not loaded, because "
                "loading it could run a program. Use a checkpoint that you or someone you trust "
                f"wrote with this package. ({_first_line(error.__cause__)})"
            ) from error
        raise _damaged(path, error) from error
    return {name: holder.state for name, holder in holders.items()}


def component_names(path: str | Path) -> set[str]:
    """The names of the states in a file. Raises ``CheckpointError`` as :func:`read_components`."""
    return set(_records(Path(path)))


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
    found = sorted(folder.glob(f"{PREFIX}*{SUFFIX}")) if folder.is_dir() else []
    if not found:
        raise CheckpointError(f"{folder}: holds no {PREFIX}*{SUFFIX} file.")
    return found[-1]


def remove_leftovers(folder: str | Path) -> None:
    """Delete what a killed process left half written in a folder of checkpoints."""
    for path in Path(folder).glob(f".{PREFIX}*"):
        if any(mark in path.name for mark in (".stage-", ".archive-", ".delete-", ".backup-")):
            remove_path(path)


def replace_by_link(source: Path, destination: Path) -> None:
    """Make ``destination`` the file that ``source`` is now, in one step and without its bytes
    being copied where the file system can link."""
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


def _records(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        manifest = Checkpoint.manifest(path)
    except UNREADABLE as error:
        if "Unsupported" in str(error):
            raise CheckpointError(f"{path}: from another version of TorchRL. {error}") from error
        raise _damaged(path, error) from error
    records: Mapping[str, Any] = manifest["components"]
    return records


def _check_record(path: Path, name: str, records: Mapping[str, Any]) -> None:
    if name not in records:
        raise CheckpointError(f"{path}: has no part {name!r}; it holds {sorted(records)}.")
    record = records[name]
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
        f"{path}: truncated or damaged ({_first_line(error)}). If an older checkpoint is beside "
        "it, delete this one to go on from there."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
