"""Spaces of tables without an environment, and checks of the shapes of columns against spaces."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column
from iql_torchrl.data.readers.columns import Table
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import DatasetError, Key, leaf_spaces
from iql_torchrl.descriptions import describe_space

__all__ = ["check_shapes", "guess_action_space", "guess_observation_space"]

CHUNK = 65_536
MOST_CATEGORIES = 2**31
#: Float actions that are whole numbers up to this one may be categories.
MOST_FLOAT_CATEGORIES = 1000


def guess_observation_space(table: Table) -> gym.Space[Any]:
    """A space per leaf; the number of categories includes those of ``next_observation``."""
    following = table.next_observation or {}
    spaces = {
        key: _space_of(table, key, column, following.get(key))
        for key, column in table.observation.items()
    }
    if ("observation",) in spaces:
        return spaces[("observation",)]
    return _nested(spaces)


def _nested(spaces: dict[Key, gym.Space[Any]]) -> gym.Space[Any]:
    children: dict[str, Any] = {}
    for name in dict.fromkeys(key[1] for key in spaces):
        inner = {key[1:]: space for key, space in spaces.items() if key[1] == name}
        children[name] = inner[(name,)] if (name,) in inner else _nested(inner)
    return gym.spaces.Dict(children)


def _space_of(table: Table, key: Key, column: Column, following: Column | None) -> gym.Space[Any]:
    kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
    if kind.kind == "f":
        return gym.spaces.Box(-np.inf, np.inf, shape, kind.type)
    if kind == np.uint8 and len(shape) >= 2:
        return gym.spaces.Box(0, 255, shape, np.uint8)
    space = _categorical(table, "/".join(key), column)
    # Terminal states occur as next observations only.
    categorical = following is not None and np.dtype(following.dtype).kind in "iu"
    if not categorical or following is None or column.shape[1:] != following.shape[1:]:
        return space
    next_space = _categorical(table, "next/" + "/".join(key), following)
    if isinstance(space, gym.spaces.Discrete) and isinstance(next_space, gym.spaces.Discrete):
        return gym.spaces.Discrete(max(int(space.n), int(next_space.n)))
    if isinstance(space, gym.spaces.MultiDiscrete) and isinstance(
        next_space, gym.spaces.MultiDiscrete
    ):
        return gym.spaces.MultiDiscrete(np.maximum(space.nvec, next_space.nvec))
    return space


def _categorical(table: Table, key: str, column: Column) -> gym.Space[Any]:
    """Discrete for ``(N,)`` or ``(N, 1)`` integers, MultiDiscrete for ``(N, k)``."""
    kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
    if kind.kind not in "iu" or len(shape) > 1:
        raise DatasetError(
            f"{table.name}: {key} has {kind} values of row shape {shape}; expected floats, integer "
            "categories, or uint8 pictures."
        )
    values = np.asarray(column[:]).reshape(table.rows, -1)
    if (low := int(values.min())) < 0:
        raise DatasetError(
            f"{table.name}: {key} has the value {low}, first at row "
            f"{int(np.flatnonzero((values < 0).any(1))[0])}; categories must be 0 or more."
        )
    if (high := int(values.max())) >= MOST_CATEGORIES:
        raise DatasetError(
            f"{table.name}: {key} has the value {high}, which cannot be a category (the most is "
            f"{MOST_CATEGORIES - 1:,}); number the categories from 0, or store numbers as floats."
        )
    top = values.max(axis=0).astype(np.int64) + 1
    return gym.spaces.Discrete(int(top[0])) if len(top) == 1 else gym.spaces.MultiDiscrete(top)


def guess_action_space(
    table: Table, options: ReadOptions
) -> tuple[gym.Space[Any], tuple[str, ...], tuple[str, ...]]:
    """The given space, or one derived from the data; with notes and warnings on the assumption."""
    if options.action_space is not None:
        return options.action_space, (), ()
    column = table.columns["action"]
    if (kind := np.dtype(column.dtype)).kind != "f":
        if (mask := table.columns.get("action_mask")) is not None and mask.shape[1:]:
            return gym.spaces.Discrete(int(mask.shape[1])), (), ()
        space = _categorical(table, "action", column)
        note = f"action space taken from the largest logged action: {space}."
        doubt = None
        if isinstance(space, gym.spaces.MultiDiscrete):
            top = np.asarray(space.nvec) - 1
            doubt = _encoded_categories(table, column, np.zeros_like(top), top)
        return space, (note,), () if doubt is None else (doubt,)
    shape = tuple(column.shape[1:])
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for start in range(0, table.rows, CHUNK):
        part = np.asarray(column[start : start + CHUNK])
        low, high = np.fmin(low, part.min(0)), np.fmax(high, part.max(0))
    if (doubt := _encoded_categories(table, column, low, high)) is not None:
        low, high = np.nan_to_num(low).astype(kind), np.nan_to_num(high).astype(kind)
        return (
            gym.spaces.Box(np.minimum(low, -1), np.maximum(high, 1), shape, kind.type),
            (),
            (doubt,),
        )
    if low.size and low.min() >= -1 and high.max() <= 1:
        note = "action bounds taken as [-1, 1]; pass env= if they are others."
        return gym.spaces.Box(-1, 1, shape, kind.type), (note,), ()
    warning = (
        f"{table.name}: actions reach {low.min():.6g} to {high.max():.6g} and no environment says "
        "what their bounds are; the data's own range per column is used: pass env=."
    )
    low, high = np.nan_to_num(low).astype(kind), np.nan_to_num(high).astype(kind)
    return gym.spaces.Box(low, high, shape, kind.type), (), (warning,)


def _encoded_categories(
    table: Table, column: Column, low: NDArray[Any], high: NDArray[Any]
) -> str | None:
    """What to pass where actions look like categories: whole float numbers, or one-hot rows.

    ``low`` and ``high``: least and largest value of each column of ``column``.
    """
    single, width = low.size == 1, int(low.size)
    if not (np.isfinite(low).all() and np.isfinite(high).all()) or low.min() < 0:
        return None
    if single and not 1 <= high.max() < MOST_FLOAT_CATEGORIES:
        return None
    if not single and (high.max() != 1 or table.rows < 2):
        return None
    for start in range(0, table.rows, CHUNK):
        part = np.asarray(column[start : start + CHUNK]).reshape(-1, width)
        if (part != np.round(part)).any() or (not single and (part.sum(axis=1) != 1).any()):
            return None
    path = table.paths["action"]
    if single:
        return (
            f"{table.name}: all actions ({path!r}) are whole numbers from {int(low.min())} to "
            f"{int(high.max())} stored as floats, and were read as continuous. If they are discrete, "
            "convert them to integers of shape (N,): astype(int)."
        )
    return (
        f"{table.name}: each row of the actions ({path!r}) holds a single 1 and otherwise 0 in {width} "
        "columns, and was read as it stands. If these are discrete actions, pass their "
        "numbers: argmax(axis=1), integers of shape (N,)."
    )


def check_shapes(
    table: Table, observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> None:
    """Raises unless every column has its space's row shape."""
    leaves = leaf_spaces(observation_space)
    if set(leaves) != set(table.observation):
        raise DatasetError(
            f"{table.name}: the data's observation has the leaves {sorted(table.observation)}, the "
            f"environment's {sorted(leaves)}; expected the same."
        )
    pairs: list[tuple[str, Column, gym.Space[Any]]] = [
        ("/".join(key), table.observation[key], space) for key, space in leaves.items()
    ]
    if table.next_observation is not None:
        pairs += [
            ("next/" + "/".join(key), table.next_observation[key], space)
            for key, space in leaves.items()
        ]
    pairs.append(("action", table.columns["action"], action_space))
    for key, column, space in pairs:
        expected = tuple(space.shape or ())
        single = not expected and tuple(column.shape[1:]) == (1,)
        if tuple(column.shape[1:]) != expected and not single:
            raise DatasetError(
                f"{table.name}: {key} has rows of shape {tuple(column.shape[1:])} in "
                f"{table.rows} rows; expected {expected} for {describe_space(space)}."
            )
    if (mask := table.columns.get("action_mask")) is not None:
        count = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else None
        if count is None or tuple(mask.shape[1:]) != (count,):
            raise DatasetError(
                f"{table.name}: action_mask has rows of shape {tuple(mask.shape[1:])}; expected one "
                f"entry per action of {action_space}."
            )
