"""TensorDicts, buffers and storages; faults of TorchRL's dataset classes, corrected or reported.

The faults were seen by running the classes of TorchRL 0.14.1 on small files;
``tests/data/test_data_torchrl.py`` runs them again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage, VideoClipRef

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    UnreadableColumn,
    array_of,
    chosen_rows,
    group_of,
    reading,
)
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError

NO_FRAMES = (
    "its frames are in video files and not in the table; load the folder of LeRobot's files itself, or "
    "name another leaf, such as columns={'observation': 'observation/state'}."
)
#: Results of a step, which TorchRL's collectors also store for the step before it, at the root.
AFTER_THE_STEP = ("reward", "done", "terminated", "truncated")
#: About how many values are looked at together.
VALUES = 2**22
#: Classes that store a file's merged ``done`` as ``terminated``.
MERGED = ("RobosetExperienceReplay", "GenDGRLExperienceReplay")


def open_torchrl(source: TensorDictBase | ReplayBuffer | Storage, options: ReadOptions) -> Columns:
    """The columns of a TensorDict, a buffer or a storage.

    Of a class of ``torchrl.data.datasets`` whose every value is zero (``MinariExperienceReplay``), it
    raises ``DatasetError``. With a warning, rows are left out that are zeros at the end of the table
    (``GenDGRLExperienceReplay``), or have zeros as the next observation of an end that does not
    terminate (D4RL, OpenX, VD4RL, AtariDQN): the rows before these are truncated. A ``terminated``
    that is a copy of the file's ``done`` is a warning.
    """
    from torchrl.data.datasets.common import BaseDatasetExperienceReplay

    name, columns, mapping = type(source).__name__, columns_of_tensordict(source), options.named
    if not isinstance(source, BaseDatasetExperienceReplay):
        return Columns(name, columns)
    numbers = [column for column in columns.values() if np.dtype(column.dtype).kind in "iuf"]
    if numbers and all(_zeros([column]).all() for column in numbers):
        advice = "load the original files"
        if name == "MinariExperienceReplay":
            advice = f"load the dataset by its id: load_dataset({source.dataset_id!r})"
        raise DatasetError(
            f"{name}: every value is zero. TorchRL 0.14.1 fills MinariExperienceReplay's table and "
            "then allocates another, memory-mapped one (memmap_like), so that the values are lost; "
            f"{advice}."
        )
    warnings = []
    if name in MERGED and "terminated" not in mapping:
        warnings.append(
            f"{name}: its 'terminated' is a copy of the file's done, so that a time limit reads as a "
            "termination, whose value is not bootstrapped; if episodes end by time, pass "
            "columns={'terminated': None, 'truncated': 'next/done'}."
        )
    defaults = {"observation": "observation", "next_observation": "next/observation"}
    paths = [mapping.get(key) or default for key, default in defaults.items()]
    groups = [
        group_of(columns, path) or group_of(columns, path.replace(".", "/")) for path in paths
    ]
    observed, following = (list(group.values()) for group in groups)
    if observed and following:
        terminated = _flags(columns, mapping.get("terminated", "next/terminated"))
        keep, text = _rows_with_next(name, observed, following, terminated)
        if text:
            warnings.append(text)
            path = mapping.get("truncated") or "next/truncated"
            truncated = _flags(columns, path)
            before = np.flatnonzero(~keep[1:] & keep[:-1])
            truncated[before] |= ~terminated[before]
            columns = chosen_rows({**columns, path: truncated}, keep)
    return Columns(name, columns, warnings=tuple(warnings))


def _rows_with_next(
    name: str, observed: list[Column], following: list[Column], terminated: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], str]:
    """Rows to keep, and a warning on the others; empty if all are kept."""
    empty, lost = _zeros(observed), _zeros(following)
    rows = len(empty)
    used = rows - int((~(empty & lost))[::-1].argmax())
    # Inside an episode a next observation of zeros is correct if the next row's observation is zero.
    lost[: used - 1] &= ~empty[1:used]
    lost &= ~terminated  # the value of their next observation is never used
    texts = []
    if count := int(lost[:used].sum()):
        texts.append(
            f"{count} rows hold zeros in place of their next observation, as {name} of TorchRL 0.14.1 "
            "writes where a trajectory ends without termination; they are left out, and the row before "
            "each is truncated"
        )
    if used < rows:
        texts.append(f"the last {rows - used} of {rows} rows hold only zeros and are left out")
    return ~lost & (np.arange(rows) < used), f"{name}: {'; '.join(texts)}." if texts else ""


def _flags(columns: Mapping[str, Column], path: str | None) -> NDArray[np.bool_]:
    """A column of done flags, ``(rows,)``; False in every row if the column does not exist."""
    rows = int(next(iter(columns.values())).shape[0])
    if path is None or path not in columns:
        return np.zeros(rows, np.bool_)
    return np.asarray(columns[path][:]).reshape(rows) != 0


def _zeros(columns: list[Column]) -> NDArray[np.bool_]:
    """Rows in which all columns are zero."""
    zeros = np.ones(int(columns[0].shape[0]), np.bool_)
    for column in columns:
        size = max(1, VALUES // max(int(np.prod(column.shape[1:])), 1))
        for start in range(0, len(zeros), size):
            values = np.asarray(column[start : start + size])
            zeros[start : start + size] &= ~values.reshape(len(values), -1).any(axis=1)
    return zeros


def columns_of_tensordict(source: TensorDictBase | ReplayBuffer | Storage) -> dict[str, Column]:
    """The leaves by ``/``-joined key, ``(N, ...)``.

    Several batch dimensions, the last one time, as collectors deliver them, are flattened: each row of
    the leading dimensions is one episode, unless trajectory numbers divide it further. Steps where
    ``("collector", "mask")``, or ``"mask"`` of ``split_trajectories``, is False only pad trajectories
    and are left out. Results of a step that ``next`` has too are left out of the root.
    """
    table = _tensordict(source)
    lead, rows = table.batch_dims, table.batch_size.numel()
    if not lead:
        raise DatasetError(
            f"{type(source).__name__}: has no batch dimension; expected one row per step."
        )
    columns: dict[str, Column] = {}
    for key in table.keys(include_nested=True, leaves_only=True):
        parts = (key,) if isinstance(key, str) else tuple(key)
        if len(parts) > 1 and isinstance(table.get(parts[:-1]), VideoClipRef):
            name = "/".join(parts[:-1])
            columns[name] = UnreadableColumn(f"{name}: {NO_FRAMES}")
        elif isinstance(values := table.get(key), torch.Tensor):
            name = "/".join(parts)
            columns[name] = array_of(values.reshape(rows, *values.shape[lead:]), name)
    flags = {
        name: np.any(np.asarray(columns[f"next/{name}"][:]).reshape(rows, -1), axis=1)
        for name in ("done", "terminated", "truncated")
        if f"next/{name}" in columns
    }
    if lead > 1 and "collector/traj_ids" not in columns:
        ends = np.arange(1, rows + 1) % table.batch_size[-1] == 0
        ends = np.any([ends, *flags.values()], axis=0)
        columns["collector/traj_ids"] = np.cumsum(ends) - ends
    if "done" in flags and "terminated" in flags:
        columns.setdefault("next/truncated", flags["done"] & ~flags["terminated"])
    for result in AFTER_THE_STEP:
        if f"next/{result}" in columns:
            columns.pop(result, None)
    mask = columns.get("collector/mask", columns.get("mask") if lead > 1 else None)
    if mask is not None and mask.dtype == np.bool_ and int(np.prod(mask.shape)) == rows:
        keep = np.asarray(mask[:]).reshape(rows)
        columns = columns if keep.all() else chosen_rows(columns, keep)
    return columns


def _stacked(rows: list[TensorDictBase]) -> TensorDictBase:
    remedy = "expected the same entries, of the same shapes, in every row"
    with reading(
        "ListStorage", "its rows cannot be stacked", RuntimeError, KeyError, remedy=remedy
    ):
        return torch.stack(rows, 0)


def _tensordict(source: TensorDictBase | ReplayBuffer | Storage) -> TensorDictBase:
    if isinstance(source, ReplayBuffer):
        source = source.storage
    if isinstance(source, Storage):
        remedy = (
            "expected a storage of a known number of rows: download a streamed dataset first "
            "(download=True)"
        )
        with reading(type(source).__name__, "has no length", RuntimeError, remedy=remedy):
            rows = len(source)
        if not rows:
            raise DatasetError("the replay buffer is empty; expected at least one transition.")
        source = source.get(slice(0, rows))
        if isinstance(source, list) and all(isinstance(row, TensorDictBase) for row in source):
            source = _stacked(source)  # of a ListStorage
    if not isinstance(source, TensorDictBase):
        raise DatasetError(
            f"the storage has {type(source).__name__} values; expected TensorDicts of transitions."
        )
    return source
