"""d3rlpy's datasets: HDF5 files written by ``dump``, and buffers in memory.

Formats by d3rlpy's own code: ``d3rlpy/dataset/io.py`` of version 2.8.1 (``dump``, ``load``), and
``MDPDataset.dump`` in ``d3rlpy/dataset.pyx`` of versions 0.91 and 1.1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import h5py
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Opened, PartsColumn
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = [
    "D3rlpyBuffer",
    "is_d3rlpy_buffer",
    "open_d3rlpy_buffer",
    "open_d3rlpy_file",
    "with_d3rlpy_ends",
]

#: What every episode of d3rlpy 2 stores, one row a step.
ARRAYS = ("observations", "actions", "rewards")
#: The columns of a file that d3rlpy 0 or 1 wrote.
OLD_COLUMNS = {*ARRAYS, "terminals", "episode_terminals"}


class D3rlpyBuffer(Protocol):
    """What a ``ReplayBuffer`` or ``MDPDataset`` of d3rlpy has, which is not imported here."""

    @property
    def episodes(self) -> Sequence[Any]: ...


#: Reads one array of an episode: (its number, its name) to the array.
ReadArray = Callable[[int, str], Any]


def open_d3rlpy_file(path: Path) -> Opened | None:
    """The columns of a file that d3rlpy 2 wrote; None for another HDF5 file.

    The file has ``observations_0``, ``actions_0``, ``rewards_0`` and ``terminated_0`` of episode 0,
    and so on. They become ``observations``, ``actions`` and ``rewards``, read episode by episode, and
    the marks ``terminals`` and ``timeouts``: the last row of an episode terminates if d3rlpy's
    ``terminated`` says so, and is truncated otherwise. d3rlpy stores no observation after the last
    step: its own transitions leave the last row of a truncated episode out, and have zeros as the next
    observation of a terminated one, as :func:`table_source` leaves it out and never uses the next
    observation of the other. Several observations (``observations_0_0``, ...) become the leaves
    ``"0"``, ``"1"``, ... of a Dict.

    Raises ``DatasetError`` for a damaged file, an episode that lacks an array or has arrays of
    different lengths, shapes or dtypes, and for format 2.0, which d3rlpy itself reads no more.
    """
    try:
        file = h5py.File(path, "r")
        names = set(file)
    except (OSError, RuntimeError) as error:
        raise DatasetError(
            f"{path}: not a complete HDF5 file ({one_line(error)}); download or copy it again."
        ) from error
    if not {"columns", "version"} <= names or not names & {"num_episodes", "total_size"}:
        file.close()
        return None
    if "num_episodes" not in names:
        file.close()
        raise DatasetError(
            f"{path}: written in d3rlpy's format 2.0, which d3rlpy itself reads no more; write it "
            "again with d3rlpy 2.1 or later, or pass a dict of arrays."
        )

    def read(episode: int, name: str) -> Any:
        key = f"{name}_{episode}"
        if key in names:
            return file[key]
        parts: list[Any] = []
        while f"{key}_{len(parts)}" in names:
            parts.append(file[f"{key}_{len(parts)}"])
        if not parts:
            raise DatasetError(
                f"{path}: episode {episode} has no {name} ({key!r}); the file is incomplete: "
                "write it again with d3rlpy's dump."
            )
        return parts

    columns = _columns(str(path), int(file["num_episodes"][()]), read)
    return Opened(path.name, columns)


def is_d3rlpy_buffer(source: Any) -> bool:
    """Whether ``source`` is a ``ReplayBuffer`` or ``MDPDataset`` of d3rlpy, which is not imported."""
    modules = {base.__module__.partition(".")[0] for base in type(source).__mro__}
    return "d3rlpy" in modules and hasattr(source, "episodes")


def open_d3rlpy_buffer(source: Any) -> Opened:
    """The columns of a buffer of d3rlpy 2 in memory; see :func:`open_d3rlpy_file`.

    The number of discrete actions is the buffer's own. A warning says where the buffer's transition
    picker is not applied, which stacks frames or sums rewards of several steps.
    """
    name, episodes = type(source).__name__, list(source.episodes)
    if not all(hasattr(episode, "terminated") for episode in episodes):
        raise DatasetError(
            f"{name}: its episodes have no mark 'terminated', so it is of a version of d3rlpy before "
            "2; write it with its method dump and pass the path of the file."
        )
    columns = _columns(name, len(episodes), lambda number, key: getattr(episodes[number], key))
    picker = type(getattr(source, "transition_picker", None)).__name__
    warnings: tuple[str, ...] = ()
    if picker not in ("NoneType", "BasicTransitionPicker"):
        warnings = (
            f"{name}: its {picker} is not applied: rows are the single steps of its episodes.",
        )
    info = getattr(source, "dataset_info", None)
    discrete = getattr(getattr(info, "action_space", None), "name", "") == "DISCRETE"
    space = gym.spaces.Discrete(int(info.action_size)) if discrete and info is not None else None
    return Opened(name, columns, action_space=space, warnings=warnings)


def with_d3rlpy_ends(path: Path, columns: dict[str, Column], options: ReadOptions) -> Opened:
    """The columns of an HDF5 file; the ends of one that d3rlpy 0 or 1 wrote as truncations.

    Such a file is a plain table with ``episode_terminals``, 1 at the last row of each episode, and
    ``terminals``, 1 where it terminated. The other ends become the column ``timeouts``. Files without
    ``version`` come from versions before 1.1, in which the reward and the termination of a row belonged
    to the action of the row before: a warning names ``reward_offset=1``. Other tables are unchanged.
    """
    if not columns.keys() >= OLD_COLUMNS or "timeouts" in columns:
        return Opened(path.name, columns)
    ends, terminals = (
        np.asarray(columns[key][:]).reshape(-1) != 0 for key in ("episode_terminals", "terminals")
    )
    if len(ends) != len(terminals):  # ``read_table`` names columns of different lengths
        return Opened(path.name, columns)
    with h5py.File(path, "r") as file:
        versioned = "version" in file
    warnings: tuple[str, ...] = ()
    if not versioned and not options.reward_offset:
        warnings = (
            f"{path.name}: has d3rlpy's columns but no version, so it may come from d3rlpy before 1.1, "
            "in which the reward of a row belongs to the action of the row before: then pass "
            "reward_offset=1; if rewards belong to their rows, ignore this warning.",
        )
    note = "the truncated ends are d3rlpy's 'episode_terminals' that do not terminate."
    return Opened(path.name, {**columns, "timeouts": ends & ~terminals}, None, warnings, (note,))


def _columns(name: str, episodes: int, read: ReadArray) -> dict[str, Column]:
    if episodes < 1:
        raise DatasetError(f"{name}: the dataset has no episodes; expected at least one.")
    lengths = np.array([len(read(number, "actions")) for number in range(episodes)], np.int64)
    columns: dict[str, Column] = {}
    for key in ARRAYS:
        first = read(0, key)
        parts = range(len(first)) if isinstance(first, list | tuple) else (None,)
        for part in parts:
            path = key if part is None else f"{key}/{part}"
            columns[path] = _joined(name, path, lengths, partial(_array, name, read, key, part))
    terminated = np.array([bool(np.asarray(read(i, "terminated"))) for i in range(episodes)])
    ends = np.zeros(int(lengths.sum()), np.bool_)
    terminals = np.zeros_like(ends)
    last = np.cumsum(lengths)[lengths > 0] - 1
    ends[last], terminals[last] = True, terminated[lengths > 0]
    return {**columns, "terminals": terminals, "timeouts": ends & ~terminals}


def _array(name: str, read: ReadArray, key: str, part: int | None, episode: int) -> Any:
    """One array of an episode: all of ``key``, or one of its several arrays."""
    value = read(episode, key)
    if isinstance(value, list | tuple) != (part is not None):
        raise DatasetError(
            f"{name}: {key} of episode {episode} is {'one array' if part is not None else 'several'}, "
            "unlike that of episode 0; expected the same in every episode."
        )
    return value if part is None else value[part]


def _joined(
    name: str, key: str, lengths: Sequence[int] | NDArray[np.int64], read: Callable[[int], Any]
) -> PartsColumn:
    """One array of all episodes."""
    first = read(0)
    row_shape, dtype = tuple(first.shape[1:]), np.dtype(first.dtype)
    for number, length in enumerate(lengths):
        array = read(number)
        if tuple(array.shape) != (length, *row_shape) or np.dtype(array.dtype) != dtype:
            raise DatasetError(
                f"{name}: {key} of episode {number} has shape {tuple(array.shape)} and dtype "
                f"{array.dtype}; expected {(int(length), *row_shape)} and {dtype}, one row per "
                "action as in episode 0."
            )
    return PartsColumn(lengths, lambda number: np.asarray(read(number)[()]), row_shape, dtype)
