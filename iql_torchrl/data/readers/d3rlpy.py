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

from iql_torchrl.data.readers.arrays import Column, Columns, flatten, open_hdf5
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError

#: What every episode of d3rlpy 2 stores, one row a step.
ARRAYS = ("observations", "actions", "rewards")
#: The columns of a file that d3rlpy 0 or 1 wrote.
OLD_COLUMNS = {*ARRAYS, "terminals", "episode_terminals"}


class D3rlpyBuffer(Protocol):
    """What a ``ReplayBuffer`` or ``MDPDataset`` of d3rlpy has, which is not imported here."""

    @property
    def episodes(self) -> Sequence[Any]: ...


def open_d3rlpy_buffer(source: Any) -> Columns | None:
    """The columns of a buffer of d3rlpy 2 in memory; None for other objects. d3rlpy is not imported.

    The number of discrete actions is the buffer's own. A warning says where the buffer's transition
    picker is not applied, which stacks frames or sums rewards of several steps.
    """
    modules = {base.__module__.partition(".")[0] for base in type(source).__mro__}
    if "d3rlpy" not in modules or not hasattr(source, "episodes"):
        return None
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
    return Columns(name, columns, action_space=space, warnings=warnings)


def open_d3rlpy_file(path: Path, options: ReadOptions) -> Columns:
    """The columns of an HDF5 file, with d3rlpy's marks if d3rlpy wrote it.

    d3rlpy 2: ``observations_0``, ``actions_0``, ``rewards_0`` and ``terminated_0`` of episode 0, and so
    on. They become ``observations``, ``actions`` and ``rewards``, and the marks ``terminals`` and
    ``timeouts``: the last row of an episode terminates if d3rlpy's ``terminated`` says so, and is
    truncated otherwise. d3rlpy stores no observation after the last step: its own transitions leave
    the last row of a truncated episode out, and have zeros as the next observation of a terminated
    one, as :func:`table_source` leaves it out and never uses the next observation of the other.
    Several observations (``observations_0_0``, ...) become the leaves ``"0"``, ``"1"``, ... of a Dict.

    d3rlpy 0 and 1: a plain table with ``episode_terminals``, 1 at the last row of each episode, and
    ``terminals``, 1 where it terminated. The other ends become the column ``timeouts``. Files without
    ``version`` come from versions before 1.1, in which the reward and the termination of a row belonged
    to the action of the row before: a warning names ``reward_offset=1``.

    Raises ``DatasetError`` for a damaged file, an episode that lacks an array or has arrays of
    different lengths, shapes or dtypes, and for format 2.0, which d3rlpy itself reads no more.
    """
    columns = open_hdf5(path)
    with h5py.File(path, "r") as file:
        names = set(file)
        if {"columns", "version"} <= names and names & {"num_episodes", "total_size"}:
            if "num_episodes" not in names:
                raise DatasetError(
                    f"{path}: written in d3rlpy's format 2.0, which d3rlpy itself reads no more; write "
                    "it again with d3rlpy 2.1 or later, or pass a dict of arrays."
                )
            count = int(file["num_episodes"][()])
            return Columns(path.name, _columns(str(path), count, partial(_stored, path, file)))
    if not columns.keys() >= OLD_COLUMNS or "timeouts" in columns:
        return Columns(path.name, columns)
    ends, terminals = (np.ravel(columns[key][:]) != 0 for key in ("episode_terminals", "terminals"))
    if len(ends) != len(terminals):  # ``read_table`` names columns of different lengths
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
    """An array of an episode of d3rlpy 2, or a list of several."""
    key = f"{name}_{episode}"
    if key in file:
        return file[key][()]
    parts: list[Any] = []
    while f"{key}_{len(parts)}" in file:
        parts.append(file[f"{key}_{len(parts)}"][()])
    if not parts:
        raise DatasetError(
            f"{path}: episode {episode} has no {name} ({key!r}); the file is incomplete: write it "
            "again with d3rlpy's dump."
        )
    return parts


def _columns(name: str, count: int, read: Callable[[int, str], Any]) -> dict[str, Column]:
    """The columns of ``count`` episodes; ``read(episode, key)`` gives an array or a list of them."""
    if count < 1:
        raise DatasetError(f"{name}: the dataset has no episodes; expected at least one.")
    episodes: list[dict[str, Any]] = []
    for number in range(count):
        values = {key: read(number, key) for key in ARRAYS}
        several = {k: dict(enumerate(v)) for k, v in values.items() if isinstance(v, list | tuple)}
        episodes.append(flatten({**values, **several}))
        for key in {**episodes[0], **episodes[number]}:
            first, array = (np.asarray(e.get(key, 0)) for e in (episodes[0], episodes[number]))
            expected = (len(episodes[number]["actions"]), *first.shape[1:])
            if array.shape != expected or array.dtype != first.dtype:
                raise DatasetError(
                    f"{name}: {key} of episode {number} has shape {array.shape} and dtype "
                    f"{array.dtype}; expected {expected} and {first.dtype}, one row per action as in "
                    "episode 0."
                )
    lengths = np.array([len(episode["actions"]) for episode in episodes])
    last = np.cumsum(lengths)[lengths > 0] - 1
    terminated = np.array([bool(read(number, "terminated")) for number in range(count)])
    ends, terminals = np.zeros((2, int(lengths.sum())), np.bool_)
    ends[last], terminals[last] = True, terminated[lengths > 0]
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    return {**columns, "terminals": terminals, "timeouts": ends & ~terminals}
