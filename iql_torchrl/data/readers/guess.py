"""The spaces of columns whose source declares none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns
from iql_torchrl.data.schema import DatasetError

CHUNK = 65_536
#: Integers up to this one are categories in any case; beyond it only if most numbers up to the largest
#: one occur. Nothing beyond ``MOST_CATEGORIES`` is a category of an observation.
FEW_CATEGORIES, MOST_CATEGORIES = 16, 65_536
#: Discrete actions have at most so many categories; float actions that are integers may be so many.
MOST_ACTIONS, MOST_FLOAT_CATEGORIES = 2**31, 1000


@dataclass
class Guess:
    """A space, what was assumed (a note), and what may be wrong (a warning); empty texts if nothing."""

    space: gym.Space[Any]
    notes: tuple[str, ...] = ()
    warning: str = ""


def guess_observation_space(parts: Sequence[Columns], place: str = "observation") -> Guess:
    """The space of the column ``place``, or a Dict of those below it, over all ``parts``.

    Floats: an unbounded Box. uint8 of two dimensions or more: pictures. One integer a row: Discrete if
    it numbers categories (from 0 or 1, at most 65,536, most of them occurring; both sides of
    ``next`` count), otherwise a number, as integers in vectors and larger arrays are: a Box of floats.
    """
    if place not in parts[0].columns:
        names = [name.removeprefix(f"{place}/") for name in parts[0].columns if f"{place}/" in name]
        inner = dict.fromkeys(n.split("/")[0] for n in names if not n.startswith("next/"))
        guesses = {each: guess_observation_space(parts, f"{place}/{each}") for each in inner}
        notes = tuple(note for guess in guesses.values() for note in guess.notes)
        return Guess(gym.spaces.Dict({k: guess.space for k, guess in guesses.items()}), notes)
    columns = [part.columns[place] for part in parts]
    kinds, shape = [np.dtype(column.dtype) for column in columns], _one_shape(parts, place)
    if all(kind.kind == "f" for kind in kinds):
        kind = np.result_type(*kinds)
        return Guess(gym.spaces.Box(-np.inf, np.inf, shape, kind.type))
    if all(kind == np.uint8 for kind in kinds) and len(shape) >= 2:
        return Guess(gym.spaces.Box(0, 255, shape, np.uint8))
    what = place.replace("/", ".")
    if int(np.prod(shape)) == 1 and (count := _categories(parts, place)):
        note = (
            f"{what}: integers from 0 to {count - 1} were read as {count} categories; pass "
            "observation_space= if they are numbers."
        )
        return Guess(gym.spaces.Discrete(count), (note,))
    note = (
        f"{what}: integers were read as numbers; pass observation_space= (Discrete, MultiDiscrete) if "
        "they are categories."
    )
    return Guess(gym.spaces.Box(-np.inf, np.inf, shape or (1,), np.float32), (note,))


def _one_shape(parts: Sequence[Columns], place: str) -> tuple[int, ...]:
    """The row shape of the column in all parts, of which each must have it."""
    first = tuple(parts[0].columns[place].shape[1:])
    for part in parts[1:]:
        column = part.columns.get(place)
        if column is None or tuple(column.shape[1:]) != first:
            found = "no such column" if column is None else f"rows of shape {column.shape[1:]}"
            raise DatasetError(
                f"{part.name}: {place.replace('/', '.')} has {found}, but {parts[0].name} has rows of "
                f"shape {first}; only datasets of the same spaces can be joined."
            )
    return first


def _categories(parts: Sequence[Columns], place: str) -> int:
    """How many categories the integers number; 0 if they are numbers."""
    sides = [
        p.columns[side] for p in parts for side in (place, f"next/{place}") if side in p.columns
    ]
    if any(np.dtype(column.dtype).kind not in "iu" for column in sides):
        return 0
    found: NDArray[Any] = np.empty(0, np.int64)
    for column in sides:
        found = np.unique(np.concatenate([found, np.unique(np.asarray(column[:]))]))
        if found[0] < 0 or found[-1] >= MOST_CATEGORIES:
            return 0
    count = int(found[-1]) + 1
    return count if count <= FEW_CATEGORIES or (found[0] <= 1 and 2 * len(found) >= count) else 0


def guess_action_space(parts: Sequence[Columns]) -> Guess:
    """Discrete for one integer a row, MultiDiscrete for several, a Box with bounds for floats."""
    shape, columns = _one_shape(parts, "action"), [part.columns["action"] for part in parts]
    path = parts[0].paths["action"]
    floats = any(np.dtype(column.dtype).kind == "f" for column in columns)
    mask = parts[0].columns.get("action_mask")
    if not floats and mask is not None and mask.shape[1:]:
        return Guess(gym.spaces.Discrete(int(mask.shape[1])))
    shape = shape or (1,)
    low, high, integers, one_hot = _ranges(columns, shape)
    if not floats:
        return _discrete(parts, low, high, path, one_hot)
    kind = np.result_type(*(np.dtype(column.dtype) for column in columns), np.float16)
    note = warning = ""
    if one_hot:
        warning = _one_hot_warning(path, low.size)
        low, high = np.minimum(low, -1), np.maximum(high, 1)
    elif (
        integers
        and low.size == 1
        and 1
        <= (high - low).max()
        < min(MOST_FLOAT_CATEGORIES, sum(part.rows for part in parts) / 3)
    ):
        first, count = int(low.min()), int(high.max() - low.min()) + 1
        start = f", start={first}" if first < 0 else ""
        if first >= 0:
            first, count = 0, int(high.max()) + 1
        warning = (
            f"all actions ({path!r}) are integers from {int(low.min())} to {int(high.max())} stored as "
            f"floats, and were read as continuous within {_in_words(low, high)}. If they are discrete, "
            f"pass action_space=gymnasium.spaces.Discrete({count}{start}), or convert them to integers "
            "of shape (N,): astype(int)."
        )
    elif low.min() >= -1 and high.max() <= 1:
        note = "action bounds taken as [-1, 1]; pass env= if they are others."
    else:
        warning = (
            f"actions reach {low.min():.6g} to {high.max():.6g} and no environment says what their "
            "bounds are; the data's own range per column is used: pass env= or action_space=."
        )
    if low.min() >= -1 and high.max() <= 1:
        low, high = np.full(shape, -1.0), np.full(shape, 1.0)
    if (constant := np.flatnonzero(low == high)).size:
        note += (
            f"actions never change in dimension {', '.join(map(str, constant[:8]))}; their bounds are "
            "taken 1 below and above."
        )
        low, high = np.where(low == high, low - 1, low), np.where(low == high, high + 1, high)
    low, high = np.nan_to_num(low).astype(kind), np.nan_to_num(high).astype(kind)
    space = gym.spaces.Box(low, high, shape, kind.type)
    return Guess(space, (note,) if note else (), warning)


def _in_words(low: NDArray[Any], high: NDArray[Any]) -> str:
    if low.min() >= -1 and high.max() <= 1:
        return "[-1, 1]"
    return f"[{low.min():g}, {high.max():g}], the data's own range"


def _ranges(
    columns: Sequence[Column], shape: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any], bool, bool]:
    """Smallest and largest action per column; whether all are integers, and whether all are one-hot."""
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    integers, one_hot = True, int(np.prod(shape)) > 1 and sum(c.shape[0] for c in columns) > 1
    for column in columns:
        for start in range(0, column.shape[0], CHUNK):
            chunk = np.asarray(column[start : start + CHUNK]).reshape(-1, *shape)
            low, high = np.fmin(low, chunk.min(0)), np.fmax(high, chunk.max(0))
            rows = chunk.reshape(len(chunk), -1)
            if integers and rows.dtype.kind == "f":
                integers = bool((rows == np.round(rows)).all())
            one_hot = bool(
                one_hot and integers and (rows >= 0).all() and (rows.sum(axis=1) == 1).all()
            )
    return low, high, integers, one_hot


def _one_hot_warning(path: str, width: int) -> str:
    return (
        f"each row of the actions ({path!r}) holds a single 1 and otherwise 0 in {width} "
        "columns, and was read as it stands. If these are discrete actions, pass their numbers: "
        "argmax(axis=1), integers of shape (N,)."
    )


def _discrete(
    parts: Sequence[Columns], low: NDArray[Any], high: NDArray[Any], path: str, one_hot: bool
) -> Guess:
    """The space of integer actions, numbered from 0."""
    if low.min() < 0 or high.max() >= MOST_ACTIONS:
        value = int(low.min() if low.min() < 0 else high.max())
        for part in parts:
            rows = np.asarray(part.columns["action"][:]).reshape(part.rows, -1)
            if (wrong := (rows == value).any(axis=1)).any():
                place = f"first at row {part.source_row(int(wrong.argmax()))} of {part.name}"
        count = int(high.max() - low.min()) + 1
        remedy = "store numbers as floats"
        if count <= MOST_FLOAT_CATEGORIES:
            space = f"gymnasium.spaces.Discrete({count}, start={int(low.min())})"
            remedy = f"pass action_space={space} if they are categories from there on, or {remedy}"
        raise DatasetError(
            f"{parts[0].name}: action ({path!r}) has the value {value}, {place}, which is not a "
            f"category; expected numbers from 0 to {MOST_ACTIONS - 1:,}: number the categories from 0; "
            f"{remedy}."
        )
    counts = high.astype(np.int64) + 1
    found: gym.Space[Any] = gym.spaces.MultiDiscrete(counts)
    if low.size == 1:
        found = gym.spaces.Discrete(int(counts.max()))
    note = f"action space taken from the largest action in the data: {found}."
    return Guess(found, (note,), _one_hot_warning(path, low.size) if one_hot else "")
