"""The spaces of columns whose source declares none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.schema import DatasetError

CHUNK = 65_536
#: Integers up to this one are categories in any case; beyond it only if most numbers up to the largest
#: one occur. Nothing beyond ``MOST_CATEGORIES`` is a category of an observation.
FEW_CATEGORIES, MOST_CATEGORIES = 16, 65_536
#: Discrete actions have at most so many categories; float actions that are integers may be so many.
MOST_ACTIONS, MOST_FLOAT_CATEGORIES = 2**31, 1000


#: A space, what was assumed (notes), and what may be wrong (a warning; empty if nothing).
Guess: TypeAlias = tuple[gym.Space[Any], list[str], str]


def guess_observation_space(parts: Sequence[Columns], place: str = "observation") -> Guess:
    """The space of the column ``place``, or a Dict of those below it, over all ``parts``.

    Floats: an unbounded Box. uint8 of two dimensions or more: pictures. One integer a row: Discrete if
    it numbers categories (from 0 or 1, at most 65,536, most of them occurring; both sides of
    ``next`` count), otherwise a number, as integers in vectors and larger arrays are: a Box of floats.
    """
    if place not in parts[0].columns:
        names = [n.removeprefix(f"{place}/") for n in parts[0].columns if n.startswith(f"{place}/")]
        inner = dict.fromkeys(name.split("/")[0] for name in names)
        guesses = {each: guess_observation_space(parts, f"{place}/{each}") for each in inner}
        notes = [note for _, texts, _ in guesses.values() for note in texts]
        return gym.spaces.Dict({key: space for key, (space, *_) in guesses.items()}), notes, ""
    shape, kinds = _row_shape(parts, place), [np.dtype(p.columns[place].dtype) for p in parts]
    if all(kind.kind == "f" for kind in kinds):
        return gym.spaces.Box(-np.inf, np.inf, shape, np.result_type(*kinds).type), [], ""
    if all(kind == np.uint8 for kind in kinds) and len(shape) >= 2:
        return gym.spaces.Box(0, 255, shape, np.uint8), [], ""
    what = place.replace("/", ".")
    if int(np.prod(shape)) == 1 and (count := _categories(parts, place)):
        note = (
            f"{what}: integers from 0 to {count - 1} were read as {count} categories; pass "
            "observation_space= if they are numbers."
        )
        return gym.spaces.Discrete(count), [note], ""
    note = (
        f"{what}: integers were read as numbers; pass observation_space= (Discrete, MultiDiscrete) if "
        "they are categories."
    )
    return gym.spaces.Box(-np.inf, np.inf, shape or (1,), np.float32), [note], ""


def _row_shape(parts: Sequence[Columns], place: str) -> tuple[int, ...]:
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
    sides = (place, f"next/{place}")
    columns = [part.columns[side] for part in parts for side in sides if side in part.columns]
    if any(np.dtype(column.dtype).kind not in "iu" for column in columns):
        return 0
    found: NDArray[Any] = np.empty(0, np.int64)
    for column in columns:
        found = np.unique(np.concatenate([found, np.unique(np.asarray(column[:]))]))
        if found[0] < 0 or found[-1] >= MOST_CATEGORIES:
            return 0
    count = int(found[-1]) + 1
    return count if count <= FEW_CATEGORIES or (found[0] <= 1 and 2 * len(found) >= count) else 0


def guess_action_space(parts: Sequence[Columns]) -> Guess:
    """Discrete for one integer a row, MultiDiscrete for several, a Box with bounds for floats."""
    shape, path = _row_shape(parts, "action") or (1,), parts[0].paths["action"]
    kind = np.result_type(*(np.dtype(part.columns["action"].dtype) for part in parts), np.float16)
    floats = any(np.dtype(part.columns["action"].dtype).kind == "f" for part in parts)
    mask = parts[0].columns.get("action_mask")
    if not floats and mask is not None and mask.shape[1:]:
        return gym.spaces.Discrete(int(mask.shape[1])), [], ""
    low, high, integers, one_hot = _ranges(parts, shape)
    if not floats:
        space, notes = _discrete(parts, low, high, path)
        return space, notes, _one_hot_warning(path, low.size) if one_hot else ""
    rows = sum(part.rows for part in parts)
    unit, notes, warning = bool(low.min() >= -1 and high.max() <= 1), list[str](), ""
    if one_hot:
        warning = _one_hot_warning(path, low.size)
    elif (
        integers
        and low.size == 1
        and 1 <= np.ptp([low, high]) < min(MOST_FLOAT_CATEGORIES, rows / 3)
    ):
        warning = _categories_warning(path, int(low.min()), int(high.max()), unit)
    elif unit:
        notes.append("action bounds taken as [-1, 1]; pass env= if they are others.")
    else:
        warning = (
            f"actions reach {low.min():.6g} to {high.max():.6g} and no environment says what their "
            "bounds are; the data's own range per column is used: pass env= or action_space=."
        )
    if unit:
        low, high = np.full(shape, -1.0), np.full(shape, 1.0)
    if (constant := np.flatnonzero(low == high)).size:
        notes.append(
            f"actions never change in dimension {', '.join(map(str, constant[:8]))}; their bounds are "
            "taken 1 below and above."
        )
        low, high = np.where(low == high, [low - 1, high + 1], [low, high])
    low, high = np.nan_to_num(low).astype(kind), np.nan_to_num(high).astype(kind)
    return gym.spaces.Box(low, high, shape, kind.type), notes, warning


def _ranges(
    parts: Sequence[Columns], shape: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any], bool, bool]:
    """Smallest and largest action per column; whether all are integers, and whether all are one-hot.

    Rows with NaN do not count: they may be dropped, and are refused otherwise.
    """
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    integers, one_hot = True, int(np.prod(shape)) > 1 and sum(part.rows for part in parts) > 1
    for column in (part.columns["action"] for part in parts):
        for start in range(0, column.shape[0], CHUNK):
            chunk = np.asarray(column[start : start + CHUNK])
            rows = chunk.reshape(len(chunk), -1)
            rows = rows[~np.isnan(rows).any(1)]
            if not len(rows):
                continue
            low = np.fmin(low, rows.min(0).reshape(shape))
            high = np.fmax(high, rows.max(0).reshape(shape))
            integers = integers and bool(rows.dtype.kind != "f" or (rows == np.round(rows)).all())
            one_hot = one_hot and integers and bool((rows >= 0).all() and (rows.sum(1) == 1).all())
    return low, high, integers, one_hot


def _one_hot_warning(path: str, width: int) -> str:
    return (
        f"each row of the actions ({path!r}) holds a single 1 and otherwise 0 in {width} "
        "columns, and was read as it stands. If these are discrete actions, pass their numbers: "
        "argmax(axis=1), integers of shape (N,)."
    )


def _categories_warning(path: str, first: int, last: int, unit: bool) -> str:
    start = f", start={first}" if first < 0 else ""
    bounds = "[-1, 1]" if unit else f"[{first}, {last}], the data's own range"
    return (
        f"all actions ({path!r}) are integers from {first} to {last} stored as floats, and were read "
        f"as continuous within {bounds}. If they are discrete, pass "
        f"action_space=gymnasium.spaces.Discrete({last - min(first, 0) + 1}{start}), or convert them "
        "to integers of shape (N,): astype(int)."
    )


def _discrete(
    parts: Sequence[Columns], low: NDArray[Any], high: NDArray[Any], path: str
) -> tuple[gym.Space[Any], list[str]]:
    """The space of integer actions, numbered from 0, and a note."""
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
    return found, [f"action space taken from the largest action in the data: {found}."]
