"""d3rlpy's datasets: HDF5 files written by ``dump``, and buffers in memory.

Formats by d3rlpy's own code: ``d3rlpy/dataset/io.py`` of version 2.8.1 (``dump``, ``load``), and
``MDPDataset.dump`` in ``d3rlpy/dataset.pyx`` of versions 0.91 and 1.1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np

from iql_torchrl.data.readers.arrays import (
    DAMAGED_HDF5,
    Column,
    Columns,
    columns_of_parts,
    flatten,
    open_hdf5,
    reading,
)
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError

#: What every episode of d3rlpy 2 stores, one row a step.
ARRAYS = ("observations", "actions", "rewards")
#: The columns of a file that d3rlpy 0 or 1 wrote.
OLD_COLUMNS = {*ARRAYS, "terminals", "episode_terminals"}


def is_d3rlpy_buffer(source: Any) -> bool:
    """Return True for a buffer of d3rlpy; d3rlpy is not imported."""
    modules = {base.__module__.partition(".")[0] for base in type(source).__mro__}
    return "d3rlpy" in modules and hasattr(source, "episodes")


def open_d3rlpy_buffer(source: Any) -> Columns:
    """The columns of a buffer of d3rlpy 2 in memory.

    The number of discrete actions is the buffer's own. A warning says where the buffer's transition
    picker is not applied, which stacks frames or sums rewards of several steps.
    """
    name, episodes = type(source).__name__, list(source.episodes)
    if not all(hasattr(episode, "terminated") for episode in episodes):
        raise DatasetError(
            f"{name}: its episodes have no flag 'terminated', so it is of a version of d3rlpy before "
            "2; write it with its method dump and pass the path of the file."
        )
    lengths = [len(episode.actions) for episode in episodes]
    columns = _columns(name, lengths, lambda number, key: getattr(episodes[number], key))
    picker = type(getattr(source, "transition_picker", None)).__name__
    warnings: tuple[str, ...] = ()
    if picker not in ("NoneType", "BasicTransitionPicker"):
        warnings = (
            f"{name}: its {picker} is not applied: rows are the single steps of its episodes.",
        )
    info = getattr(source, "dataset_info", None)
    discrete = getattr(getattr(info, "action_space", None), "name", "") == "DISCRETE"
    space = gym.spaces.Discrete(int(info.action_size)) if discrete and info is not None else None
    return Columns(name, columns, action_space=space, warnings=warnings)


def open_d3rlpy_file(path: Path, options: ReadOptions) -> Columns:
    """The columns of an HDF5 file, with d3rlpy's done flags if d3rlpy wrote it.

    d3rlpy 2 (``observations_0``, ``actions_0``, ``rewards_0``, ``terminated_0`` of episode 0, ...): the
    last row of an episode terminates if ``terminated`` says so (``terminals``), and is truncated
    otherwise (``timeouts``). No observation after the last step is stored. Several observations
    (``observations_0_0``, ...) become the leaves ``"0"``, ``"1"``, ... of a Dict.

    d3rlpy 0 and 1: the rows that end an episode (``episode_terminals``) and do not terminate
    (``terminals``) become ``timeouts``. Before version 1.1, whose files lack ``version``, the reward
    of a row belonged to the action of the row before: a warning names ``reward_offset=1``.

    Raises ``DatasetError`` for a damaged file, an episode that lacks an array or has arrays of
    different lengths, shapes or dtypes, and for format 2.0, which d3rlpy itself reads no more.
    """
    with reading(path, *DAMAGED_HDF5):
        file = h5py.File(path, "r")
        names = set(file)
    if {"columns", "version"} <= names and names & {"num_episodes", "total_size"}:
        if "num_episodes" not in names:
            raise DatasetError(
                f"{path}: written in d3rlpy's format 2.0, which d3rlpy itself reads no more; write "
                "it again with d3rlpy 2.1 or later, or pass a dict of arrays."
            )
        stored = partial(_stored, path, file)
        lengths = [len(stored(number, "actions")) for number in range(file["num_episodes"][()])]
        return Columns(path.name, _columns(str(path), lengths, stored))
    columns = open_hdf5(path)
    if not columns.keys() >= OLD_COLUMNS or "timeouts" in columns:
        return Columns(path.name, columns)
    ends, terminals = (np.ravel(columns[key][:]) != 0 for key in ("episode_terminals", "terminals"))
    if len(ends) != len(terminals):  # columns of different lengths are named later
        return Columns(path.name, columns)
    warnings: tuple[str, ...] = ()
    if "version" not in names and not options.reward_offset:
        warnings = (
            f"{path.name}: has d3rlpy's columns but no version, so it may come from d3rlpy before 1.1, "
            "in which the reward of a row belongs to the action of the row before: then pass "
            "reward_offset=1; if rewards belong to their rows, ignore this warning.",
        )
    note = "the truncated ends are d3rlpy's 'episode_terminals' that do not terminate."
    columns["timeouts"] = ends & ~terminals
    return Columns(path.name, columns, warnings=warnings, notes=(note,))


def _stored(path: Path, file: h5py.File, episode: int, name: str) -> Any:
    """An array of an episode of d3rlpy 2, not yet read, or a list of several."""
    key = f"{name}_{episode}"
    if key in file:
        return file[key]
    parts: list[Any] = []
    while f"{key}_{len(parts)}" in file:
        parts.append(file[f"{key}_{len(parts)}"])
    if not parts:
        raise DatasetError(
            f"{path}: episode {episode} has no {name} ({key!r}); the file is incomplete: write it "
            "again with d3rlpy's dump."
        )
    return parts


def _columns(
    name: str, lengths: Sequence[int], stored: Callable[[int, str], Any]
) -> dict[str, Column]:
    """The columns of all episodes; ``stored(episode, key)`` gives an array or a list of them."""
    if not lengths:
        raise DatasetError(f"{name}: the dataset has no episodes; expected at least one.")

    def read(number: int) -> dict[str, Any]:
        values = {key: stored(number, key) for key in ARRAYS}
        several = {k: dict(enumerate(v)) for k, v in values.items() if isinstance(v, list | tuple)}
        with reading(name, *DAMAGED_HDF5):
            return flatten({**values, **several})

    ends, terminals = np.zeros((2, sum(lengths)), np.bool_)
    for number, end in enumerate(np.cumsum(lengths)):
        if lengths[number]:
            ends[end - 1], terminals[end - 1] = True, np.asarray(stored(number, "terminated"))
    columns = columns_of_parts(lengths, read, name)
    return {**columns, "terminals": terminals, "timeouts": ends & ~terminals}
