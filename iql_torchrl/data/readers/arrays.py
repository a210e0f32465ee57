"""Columns of a table: arrays of files, dicts and tensors, sliced by rows."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import h5py
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = [
    "TABLE_FILES",
    "Column",
    "Opened",
    "array_of",
    "check_numbers",
    "flatten",
    "hdf5_parts",
    "open_hdf5",
    "open_npz",
]

#: Suffixes of the files that contain a table.
TABLE_FILES = (".hdf5", ".h5", ".npz", ".parquet")


class Column(Protocol):
    """An array, or an object on disk that can be sliced by rows like an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True)
class Opened:
    """The columns of a table by their names in the source, and what its reader says about them.

    The spaces and the environment are those that the source records, if any. ``warnings`` become
    ``DatasetWarning``.
    """

    name: str
    columns: dict[str, Column]
    action_space: gym.Space[Any] | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    observation_space: gym.Space[Any] | None = None
    env_spec: EnvSpec | None = None


def open_hdf5(path: Path) -> dict[str, Column]:
    """The file's datasets by path, not yet read. Raises ``DatasetError`` naming a damaged file."""
    for part in hdf5_parts(path):
        if not part.is_file():
            raise DatasetError(
                f"{path}: takes part of its data from the file {part}, which does not exist; HDF5 "
                "would read fill values in its place. Put the file there."
            )
    try:
        file = h5py.File(path, "r")
        columns: dict[str, Column] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim:
                columns[name] = item

        file.visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:
        raise DatasetError(
            f"{path}: not a complete HDF5 file ({one_line(error)}); download or copy it again."
        ) from error
    return columns


def hdf5_parts(path: Path) -> tuple[Path, ...]:
    """Other files from which the file's virtual and external datasets take their data.

    Names with a pattern (``%b``) are left out. Empty for a damaged file.
    """
    names: set[str] = set()

    def visit(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.is_virtual:
                names.update(source.file_name for source in item.virtual_sources())
            names.update(name for name, _, _ in item.external or ())

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError):
        return ()
    file_names = sorted(name for name in names if name != "." and "%" not in name)
    # HDF5 looks candidates the file first, then in the current folder.
    candidates = [(path.parent / name, Path(name)) for name in file_names]
    return tuple(
        here if not name.is_file() or here.is_file() else name for here, name in candidates
    )


def open_npz(path: Path) -> dict[str, Column]:
    """The archive's arrays. Raises ``DatasetError`` naming a damaged file."""
    try:
        # Opened here: NumPy leaves a file open that turns out not to be an archive.
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DatasetError(
                    f"{path}: contains one array of shape {archive.shape}; expected an archive of "
                    "named columns, as numpy.savez writes it."
                )
            with archive:
                columns = {name: _entry(archive, name) for name in archive.files}
    except DatasetError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DatasetError(
            f"{path}: not a complete npz archive ({one_line(error)}); download or copy it again."
        ) from error
    return {name: column for name, column in columns.items() if column.ndim}


def _entry(archive: Any, name: str) -> NDArray[Any]:
    """An array of the archive; Python objects, which are never unpickled, as an empty one."""
    try:
        entry: NDArray[Any] = archive[name]
        return entry
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        return np.empty(0, object)


def flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Column]:
    """Nested mappings of arrays as one level, names joined by ``/``."""
    flat: dict[str, Column] = {}
    for name, value in arrays.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        elif isinstance(value, torch.Tensor):
            flat[path] = array_of(value, path)
        else:
            flat[path] = _array(value, path)
    return flat


def _array(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray) and (count := int(np.ma.getmaskarray(value).sum())):
        raise DatasetError(
            f"{name}: {count} of {value.size} values are masked; expected numbers: leave those rows "
            "out, or fill the values."
        )
    try:
        return np.asarray(value)
    except ValueError:  # Rows of different shapes; only an error if the column is read.
        rows = np.empty(len(value), object)
        rows[:] = [None] * len(value)
        return rows


def array_of(values: torch.Tensor, name: str) -> NDArray[Any]:
    """A tensor as an array; bfloat16, which NumPy lacks, as float32.

    Raises ``DatasetError`` for tensors that are not dense.
    """
    plain = values.detach().cpu()
    try:
        array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    except (TypeError, RuntimeError) as error:
        raise DatasetError(
            f"{name}: a tensor of dtype {values.dtype} and layout {values.layout} has no array "
            f"({one_line(error)}); expected a dense tensor of real numbers or booleans."
        ) from error
    return array


def check_numbers(name: str, columns: Mapping[str, Column]) -> None:
    """Raises unless each column has rows, and each row numbers."""
    for key, column in columns.items():
        shape, kind = tuple(column.shape), np.dtype(column.dtype)
        expected = "expected an array of real numbers or booleans with one row per step"
        if not shape:
            raise DatasetError(f"{name}: {key} is a single value of dtype {kind}; {expected}.")
        if kind.kind == "O":
            raise DatasetError(
                f"{name}: {key} has Python objects (dtype object): rows of different lengths, or "
                f"no numbers; {expected}, all rows of one shape. Join episodes of different lengths "
                "with numpy.concatenate and mark their ends."
            )
        if kind.kind not in "biuf":
            raise DatasetError(f"{name}: {key} has {kind} values of shape {shape}; {expected}.")
        if 0 in shape[1:]:
            raise DatasetError(
                f"{name}: {key} has shape {shape}: its rows hold no numbers; {expected}."
            )
