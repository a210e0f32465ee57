"""Tables and their columns: opened, found under their names, and held to one length."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from iql_torchrl.data.sources import ReadOptions
from iql_torchrl.data.transitions import DatasetError, Key

__all__ = ["Column", "Table", "flatten", "open_hdf5", "open_npz", "read_table"]

#: Names a file may use for our keys, exact; ``columns`` overrides.
NAMES: dict[str, tuple[str, ...]] = {
    "observation": ("observation", "observations", "obs"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards", "next/reward"),
    "next_observation": (
        "next_observation", "next_observations", "next_obs", "next/observation",
    ),
    "terminated": (
        "terminated", "terminateds", "terminals", "terminations", "next/terminated",
    ),
    "truncated": ("truncated", "truncateds", "timeouts", "truncations", "next/truncated"),
    "episode": ("episode", "episodes", "episode_id", "episode_ids", "collector/traj_ids"),
    "action_mask": ("action_mask", "action_masks"),
    "next_action_mask": ("next_action_mask", "next_action_masks", "next/action_mask"),
    "action_log_prob": ("action_log_prob", "action_log_probs"),
}  # fmt: skip


class Column(Protocol):
    """An array, or something on disk that slices like one along its rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


def open_hdf5(path: Path) -> dict[str, Column]:
    """The file's datasets by path, unread. Raises ``DatasetError`` naming a damaged file."""
    try:
        file = h5py.File(path, "r")
        found: dict[str, Column] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim:
                found[name] = item

        file.visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:
        raise DatasetError(
            f"{path}: not a whole HDF5 file ({' '.join(str(error).split())}); fetch it again."
        ) from error
    return found


def open_npz(path: Path) -> dict[str, Column]:
    """The archive's arrays. Raises ``DatasetError`` naming a damaged file."""
    try:
        # Opened here: NumPy leaves a file open that turns out not to be an archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if archive[name].ndim}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DatasetError(
            f"{path}: not a whole npz archive ({' '.join(str(error).split())}); fetch it again."
        ) from error


def flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Column]:
    """Nested mappings of arrays as one level, names joined by ``/``."""
    flat: dict[str, Column] = {}
    for name, value in arrays.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        elif isinstance(value, torch.Tensor):
            flat[path] = value.detach().cpu().numpy()
        else:
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise DatasetError(
                    f"{path}: holds {array.dtype} values; wanted an array of numbers with one "
                    "row per step."
                )
            flat[path] = array
    return {name: column for name, column in flat.items() if column.shape}


@dataclass(frozen=True)
class Table:
    """The columns under our names; observations by leaf key."""

    name: str
    rows: int
    observation: dict[Key, Column]
    next_observation: dict[Key, Column] | None
    columns: dict[str, Column]
    truncation_ignored: bool

    def flags(self, key: str) -> NDArray[np.bool_] | None:
        """A column of 0 and 1 as booleans, ``(rows,)``."""
        column = self.columns.get(key)
        if column is None:
            return None
        values = np.asarray(column[:]).reshape(self.rows)
        if values.dtype == np.bool_:
            return values
        bad = np.flatnonzero((values != 0) & (values != 1))
        if len(bad):
            raise DatasetError(
                f"{self.name}: {key} holds {values[bad[0]]} in {len(bad)} of {self.rows} rows, "
                f"first at row {bad[0]}; wanted 0 or 1."
            )
        return values.astype(np.bool_)


def read_table(name: str, columns: dict[str, Column], options: ReadOptions) -> Table:
    unknown = set(options.columns) - set(NAMES)
    if unknown:
        raise DatasetError(
            f"{name}: columns maps {sorted(unknown)}; the keys are {', '.join(NAMES)}."
        )
    found = {key: _find(name, key, columns, options) for key in NAMES}
    named: dict[str, Column] = {}
    observation: dict[Key, Column] = {}
    following: dict[Key, Column] = {}
    for key, path in found.items():
        if path is None:
            continue
        inner = {p[len(path) + 1 :]: c for p, c in columns.items() if p.startswith(f"{path}/")}
        if key in ("observation", "next_observation"):
            leaves = observation if key == "observation" else following
            if path in columns:
                leaves[("observation",)] = columns[path]
            leaves.update({("observation", *p.split("/")): c for p, c in inner.items()})
        elif path in columns:
            named[key] = columns[path]
    if not following:
        found["next_observation"] = None
    elif set(following) != set(observation):
        raise DatasetError(
            f"{name}: next_observation has the leaves {sorted(following)}, observation has "
            f"{sorted(observation)}; wanted the same."
        )
    rows = next(iter(observation.values())).shape[0]
    if rows == 0:
        raise DatasetError(f"{name}: observation has 0 rows; wanted at least one transition.")
    every = {**named, **{"/".join(k): c for k, c in observation.items()}}
    every.update({"next/" + "/".join(k): c for k, c in following.items()})
    _same_rows(name, rows, every)
    for key in ("reward", "terminated", "truncated", "episode", "action_log_prob"):
        if key in named and int(np.prod(named[key].shape[1:])) != 1:
            raise DatasetError(
                f"{name}: {key} has shape {tuple(named[key].shape)}; wanted one number a row, "
                f"({rows},) or ({rows}, 1)."
            )
    ignored = options.columns.get("truncated", "") is None
    return Table(name, rows, observation, following or None, named, ignored)


def _find(name: str, key: str, columns: dict[str, Column], options: ReadOptions) -> str | None:
    """The column (or group of columns) that holds a key."""

    def present(path: str) -> bool:
        return path in columns or any(p.startswith(f"{path}/") for p in columns)

    listing = ", ".join(sorted(columns)) or "nothing"
    if key in options.columns:
        path = options.columns[key]
        if path is not None and not present(path):
            raise DatasetError(f"{name}: columns maps {key} to {path!r}; the data has {listing}.")
        if path is None and key in ("observation", "action", "reward", "terminated"):
            raise DatasetError(f"{name}: {key} cannot be left out.")
        return path
    matches = [path for path in NAMES[key] if present(path)]
    if len(matches) > 1:
        raise DatasetError(
            f"{name}: {key} could be any of {', '.join(matches)}; choose with "
            f"columns={{{key!r}: ...}}."
        )
    if not matches and key in ("observation", "action", "reward", "terminated"):
        merged = [p for p in ("done", "dones", "next/done") if p in columns]
        hint = (
            f" {merged[0]!r} may merge termination with truncation: if it means termination alone,"
            " say so."
            if key == "terminated" and merged
            else ""
        )
        raise DatasetError(
            f"{name}: no column for {key} among {listing}; name it with "
            f"columns={{{key!r}: ...}}.{hint}"
        )
    return matches[0] if matches else None


def _same_rows(name: str, rows: int, columns: Mapping[str, Column]) -> None:
    for key, column in columns.items():
        if column.shape[0] != rows:
            raise DatasetError(
                f"{name}: {key} has {column.shape[0]} rows, observation has {rows}; wanted one row "
                "per step in every column."
            )
