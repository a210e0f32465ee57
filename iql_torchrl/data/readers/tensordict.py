"""TensorDicts, and TorchRL's replay buffers and storages, as tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage, VideoClipRef

from iql_torchrl.data.readers.arrays import Column, array_of
from iql_torchrl.data.readers.parts import UnreadableColumn, chosen_rows
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["columns_of_tensordict"]

NO_FRAMES = (
    "its frames are in video files and not in the table; load the folder of LeRobot's files itself, or "
    "name another leaf, such as columns={'observation': 'observation/state'}."
)
#: Results of a step, which TorchRL's collectors also store for the step before it, at the root.
AFTER_THE_STEP = ("reward", "done", "terminated", "truncated")


def columns_of_tensordict(source: TensorDictBase | ReplayBuffer | Storage) -> dict[str, Column]:
    """The leaves by ``/``-joined key, ``(N, ...)``.

    Several batch dimensions, the last one time, as collectors deliver them, are flattened. Each row
    of the leading dimensions is then one episode, unless trajectory numbers divide it further.
    Steps where ``("collector", "mask")`` (``"mask"`` after ``split_trajectories`` of a table without
    ``collector``) is False only pad trajectories to one length and are left out.
    ``("next", "truncated")`` is computed from ``done`` and ``terminated`` where it is missing. Rewards
    and marks of the state before the action are left out where ``next`` has those after it.
    """
    table = _table(source)
    if not table.batch_dims:
        raise DatasetError(
            f"{type(source).__name__}: has no batch dimension; expected one row per step."
        )
    names = [
        (key,) if isinstance(key, str) else tuple(key)
        for key in table.keys(include_nested=True, leaves_only=True)
    ]
    lead = table.batch_dims
    rows = table.batch_size.numel()
    columns: dict[str, Column] = {}
    for key in names:
        if len(key) > 1 and isinstance(table.get(key[:-1]), VideoClipRef):
            name = "/".join(key[:-1])
            columns[name] = UnreadableColumn(f"{name}: {NO_FRAMES}")
            continue
        values = table.get(key)
        if isinstance(values, torch.Tensor):
            flat = values.reshape(rows, *values.shape[lead:])
            columns["/".join(key)] = array_of(flat, "/".join(key))
    if lead > 1 and "collector/traj_ids" not in columns:
        columns["collector/traj_ids"] = _numbered(columns, rows, table.batch_size[-1])
    if "next/done" in columns and "next/terminated" in columns and "next/truncated" not in columns:
        done, terminated = (np.asarray(columns[f"next/{k}"][:]) for k in ("done", "terminated"))
        columns["next/truncated"] = done.astype(bool) & ~terminated.astype(bool)
    for result in AFTER_THE_STEP:
        if f"next/{result}" in columns:
            columns.pop(result, None)
    mask = columns.get("collector/mask", columns.get("mask") if lead > 1 else None)
    if mask is not None and mask.dtype == np.bool_ and int(np.prod(mask.shape)) == rows:
        keep = np.asarray(mask[:]).reshape(rows)
        columns = columns if keep.all() else chosen_rows(columns, keep)
    return columns


def _numbered(columns: dict[str, Column], rows: int, steps: int) -> Any:
    """Episode numbers that also change after each mark."""
    ends = np.arange(1, rows + 1) % steps == 0
    for name in ("next/done", "next/terminated", "next/truncated"):
        if name in columns:
            ends |= np.asarray(columns[name][:]).reshape(rows).astype(bool)
    return np.concatenate([[0], np.cumsum(ends)[:-1]])


def _table(source: TensorDictBase | ReplayBuffer | Storage) -> TensorDictBase:
    if isinstance(source, ReplayBuffer):
        source = source.storage
    if isinstance(source, Storage):
        if not _length(source):
            raise DatasetError("the replay buffer is empty; expected at least one transition.")
        source = source.get(slice(0, _length(source)))
    if not isinstance(source, TensorDictBase):
        raise DatasetError(
            f"the storage has {type(source).__name__} values; expected TensorDicts of transitions."
        )
    return source


def _length(storage: Storage) -> int:
    try:
        return len(storage)
    except RuntimeError as error:
        raise DatasetError(
            f"{type(storage).__name__}: has no length ({one_line(error)}); expected a storage of a "
            "known number of rows: download a streamed dataset first (download=True)."
        ) from error
