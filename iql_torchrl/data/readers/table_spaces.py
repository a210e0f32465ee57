"""Spaces for tables that come without an environment, and the shapes they must agree on."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from iql_torchrl.data.readers.arrays import Column
from iql_torchrl.data.readers.columns import Table
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import DatasetError, Key, leaf_spaces
from iql_torchrl.descriptions import describe_space

__all__ = ["check_shapes", "guess_action_space", "guess_observation_space"]

CHUNK = 65_536
MOST_CATEGORIES = 2**31


def guess_observation_space(table: Table) -> gym.Space[Any]:
    spaces = {key: _space_of(table, key, column) for key, column in table.observation.items()}
    if ("observation",) in spaces:
        return spaces[("observation",)]
    return _nested(spaces)


def _nested(spaces: dict[Key, gym.Space[Any]]) -> gym.Space[Any]:
    children: dict[str, Any] = {}
    for name in dict.fromkeys(key[1] for key in spaces):
        inner = {key[1:]: space for key, space in spaces.items() if key[1] == name}
        children[name] = inner[(name,)] if (name,) in inner else _nested(inner)
    return gym.spaces.Dict(children)


def _space_of(table: Table, key: Key, column: Column) -> gym.Space[Any]:
    kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
    if kind.kind == "f":
        return gym.spaces.Box(-np.inf, np.inf, shape, kind.type)
    if kind == np.uint8 and len(shape) >= 2:
        return gym.spaces.Box(0, 255, shape, np.uint8)
    return _categorical(table, "/".join(key), column)


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
        return space, (f"action space taken from the largest logged action: {space}.",), ()
    shape = tuple(column.shape[1:])
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for start in range(0, table.rows, CHUNK):
        part = np.asarray(column[start : start + CHUNK])
        low, high = np.fmin(low, part.min(0)), np.fmax(high, part.max(0))
    if low.size and low.min() >= -1 and high.max() <= 1:
        note = "action bounds taken as [-1, 1]; pass env= if they are others."
        return gym.spaces.Box(-1, 1, shape, kind.type), (note,), ()
    warning = (
        f"{table.name}: actions reach {low.min():.6g} to {high.max():.6g} and no environment says "
        "what their bounds are; the data's own range per column is used: pass env=."
    )
    low, high = np.nan_to_num(low).astype(kind), np.nan_to_num(high).astype(kind)
    return gym.spaces.Box(low, high, shape, kind.type), (), (warning,)


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
