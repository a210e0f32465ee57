"""The columns of a table: their names, their shapes, and the spaces they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, ComputedColumn
from iql_torchrl.data.readers.motion import Motion, differs, motion_of
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import (
    ACTION,
    LOG_PROB,
    MASK,
    NEXT_MASK,
    REWARD,
    DatasetError,
    Key,
    dotted,
)

Flags: TypeAlias = NDArray[np.bool_]
#: Names of columns that mark ends of trajectories in some files, terminations in others. In a file
#: that has ``not_terminated`` or ``valid`` they mark ends of trajectories.
TRAJECTORY_ENDS = ("terminals", "dones_float")
#: Keys without which there are no transitions.
REQUIRED = ("observation", "action", "reward", "terminated")

#: Keys that may name a group of columns.
GROUPS = ("observation", "next_observation")
#: Keys of what follows a row, which ``next`` has in a table of transitions.
OF_NEXT = ("reward", "next_observation", "next_action_mask")
#: Keys of columns of 0 and 1.
FLAGS = ("terminated", "not_terminated", "truncated", "trajectory_end", "valid")
#: Keys of one number a row.
SINGLE = (*FLAGS, "reward", "episode", "action_log_prob")

#: Names that a file may use for our keys, compared exactly; ``columns`` overrides them.
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
    "not_terminated": ("masks",),
    "truncated": ("truncated", "truncateds", "timeouts", "truncations", "next/truncated"),
    "valid": ("valids",),
    "episode": (
        "episode", "episodes", "episode_id", "episode_ids", "episode_index", "collector/traj_ids",
    ),
    "action_mask": ("action_mask", "action_masks"),
    "next_action_mask": ("next_action_mask", "next_action_masks", "next/action_mask"),
    "action_log_prob": ("action_log_prob", "action_log_probs"),
}  # fmt: skip

#: Rows of one block.
CHUNK = 65_536
MOST_CATEGORIES = 2**31
#: Float actions that are whole numbers below this one may be categories.
MOST_FLOAT_CATEGORIES = 1000


@dataclass(frozen=True)
class Table:
    """The columns of a source by our keys.

    ``columns``: what transitions contain, by its key in their table, without marks; ``next`` as far
    as the source has it. ``flags``: for each of ``FLAGS`` a mark in each row, ``(rows,)``; where the
    file has none, all rows are valid and no other mark is set. ``episode``: the number of each row's
    episode, if known. ``paths``: by our names, the names in the file. ``unused``: its other columns.
    """

    name: str
    rows: int
    columns: dict[Key, Column]
    flags: dict[str, Flags]
    episode: NDArray[Any] | None
    paths: dict[str, str]
    unused: dict[str, Column]

    @property
    def observation(self) -> dict[Key, Column]:
        return {key: column for key, column in self.columns.items() if key[0] == "observation"}

    @property
    def next_observation(self) -> dict[Key, Column]:
        """By the keys of ``observation``; empty where it is unknown."""
        following = ("next", "observation")
        return {key[1:]: column for key, column in self.columns.items() if key[:2] == following}

    @cached_property
    def broken(self) -> Flags | None:
        """Rows whose ``next_observation`` is not the next row's observation, ``(rows - 1,)``."""
        following = self.next_observation
        return differs(self.observation, following, self.rows) if following else None

    @cached_property
    def motion(self) -> Motion | None:
        return motion_of(self.observation, self.columns[ACTION])


def read_table(name: str, columns: dict[str, Column], options: ReadOptions) -> Table:
    """The columns by our keys, each with one row of numbers a step; raises ``DatasetError``."""
    columns = columns | _joined(name, columns, options)
    paths = _paths(name, columns, options.named)
    entries: dict[Key, Column] = {}
    rows: int | None = None
    for key, path in paths.items():
        leaves = _leaves(columns, path)
        if key not in GROUPS:
            leaves = {(): _single(name, columns, key, path)}
        place = ("next", key.removeprefix("next_")) if key in OF_NEXT else (key,)
        for rest, column in leaves.items():
            if not rest or column.shape:
                subject = "/".join((key, *rest))
                rows = _checked_rows(f"{name}: {subject}", column, rows, key in SINGLE)
                entries[(*place, *rest)] = column
    if not rows:
        raise DatasetError(f"{name}: observation has 0 rows; expected at least one transition.")
    if MASK not in entries:
        entries.pop(NEXT_MASK, None)
    if (reward := entries.get(REWARD)) is None:  # left out: data without a task
        entries[REWARD] = np.zeros(rows, np.float32)
    elif options.columns.get("reward") and reward.dtype == np.bool_:
        entries[REWARD] = np.asarray(reward[:], np.float32)  # such as LeRobot's success
    marks = {k: np.ravel(entries.pop((k,))[:]) for k in (*FLAGS, "episode") if k in paths}
    table = Table(
        name, rows, entries, _flags(name, rows, marks, paths), marks.get("episode"), paths,
        unused={path: column for path, column in columns.items() if path not in paths.values()},
    )  # fmt: skip
    observed, following = (
        ", ".join(
            sorted(f"{dotted(key)} {tuple(column.shape[1:])}" for key, column in side.items())
        )
        for side in (table.observation, table.next_observation)
    )
    if following not in ("", observed):
        raise DatasetError(
            f"{name}: next_observation has the leaves {following}, observation has {observed}; "
            "expected the same."
        )
    return table


def _leaves(columns: Mapping[str, Column], path: str) -> dict[Key, Column]:
    """The column ``path`` by the key ``()``, or those of the group ``path`` by their further names."""
    return {
        tuple(name.removeprefix(path).split("/")[1:]): column
        for name, column in columns.items()
        if name == path or name.startswith(f"{path}/")
    }


def _single(name: str, columns: Mapping[str, Column], key: str, path: str) -> Column:
    """The column ``path``, which is no group."""
    leaves = _leaves(columns, path)
    if () in leaves:
        return leaves[()]
    inner = ", ".join(map("/".join, leaves))
    raise DatasetError(f"{name}: {key} ({path!r}) is a group of {inner}; expected one array.")


def _joined(name: str, columns: Mapping[str, Column], options: ReadOptions) -> dict[str, Column]:
    """A column of floats for each list of columns of one number in ``options.columns``."""
    joined: dict[str, Column] = {}
    for key, listed in options.columns.items():
        if listed is None or isinstance(listed, str):
            continue
        parts: list[Column] = []
        rows: int | None = None
        for each in listed:
            parts.append(_single(name, columns, key, _named(name, columns, key, each)))
            subject = f"{name}: {each!r}, one of the columns of {key},"
            rows = _checked_rows(subject, parts[-1], rows, single=True)
        joined[str(options.named[key])] = _side_by_side(parts)
    return joined


def _side_by_side(parts: list[Column]) -> Column:
    def read(rows: slice) -> NDArray[Any]:
        return np.stack([np.asarray(p[rows], np.float64).reshape(-1) for p in parts], axis=1)

    return ComputedColumn((parts[0].shape[0], len(parts)), np.float64, read)


def _checked_rows(subject: str, column: Column, rows: int | None, single: bool) -> int:
    """The column's number of rows, which is ``rows`` if known; raises unless each holds numbers.

    ``single``: one number.
    """
    shape, kind = tuple(column.shape), np.dtype(column.dtype)
    if not shape:
        problem = f"is a single value of dtype {kind}"
    elif kind.kind == "O":
        problem = "has Python objects (dtype object): rows of different lengths, or no numbers"
    elif kind.kind not in "biuf":
        problem = f"has {kind} values of shape {shape}"
    elif 0 in shape[1:]:
        problem = f"has shape {shape}: its rows hold no numbers"
    elif rows not in (None, shape[0]):
        problem = f"has {shape[0]} rows, where the columns before it have {rows}"
    elif single and int(np.prod(shape[1:])) != 1:
        problem = f"has shape {shape}, where ({shape[0]},) or ({shape[0]}, 1) is needed"
    else:
        return shape[0]
    raise DatasetError(
        f"{subject} {problem}; expected an array of real numbers or booleans with one row per step, "
        "all rows of one shape. Join episodes of different lengths with numpy.concatenate and mark "
        "their ends."
    )


def _flags(
    name: str, rows: int, marks: Mapping[str, NDArray[Any]], paths: Mapping[str, str]
) -> dict[str, Flags]:
    flags = {}
    for key in FLAGS:
        values = marks.get(key, np.full(rows, key == "valid"))
        if len(wrong := np.flatnonzero((values != 0) & (values != 1))):
            raise DatasetError(
                f"{name}: {key} ({paths[key]!r}) has {values[wrong[0]]} in {len(wrong)} of {rows} rows "
                f"with other values than 0 and 1, first at row {wrong[0]}; expected 0 or 1."
            )
        flags[key] = values.astype(np.bool_)
    if "not_terminated" not in marks:
        return flags
    opposite = ~flags["not_terminated"]
    if "terminated" in marks and len(differ := np.flatnonzero(flags["terminated"] != opposite)):
        first, second = paths["not_terminated"], paths["terminated"]
        raise DatasetError(
            f"{name}: {first!r} (0 where a row terminates) and {second!r} (1 there) disagree in "
            f"{len(differ)} of {rows} rows, first at row {differ[0]}; choose one with "
            f"columns={{'terminated': {second!r}}} or columns={{'not_terminated': {first!r}, "
            "'terminated': None}."
        )
    return flags | {"terminated": opposite}


def _paths(
    name: str, columns: Mapping[str, Column], options: Mapping[str, str | None]
) -> dict[str, str]:
    """The column, or group of columns, of each key of a ``Table``; without keys that have none."""
    if unknown := set(options) - set(NAMES):
        raise DatasetError(
            f"{name}: columns maps {sorted(unknown)}; the keys are {', '.join(NAMES)}."
        )
    mapping = dict(options)
    if mapping.get("terminated") in NAMES["not_terminated"]:
        # The name gives the meaning of its values: 0 where a row terminates.
        mapping.setdefault("not_terminated", mapping.pop("terminated"))
    elif "terminated" in mapping:
        if mapping.get("not_terminated") and mapping["terminated"]:
            raise DatasetError(
                f"{name}: columns maps terminated to {mapping['terminated']!r} and not_terminated to "
                f"{mapping['not_terminated']!r}; one is the opposite of the other: name one of them."
            )
        mapping.setdefault("not_terminated", None)
    paths = {key: _find(name, columns, mapping, key) for key in NAMES if key != "terminated"}
    if paths["not_terminated"] or (paths["valid"] and "terminated" not in mapping):
        # Columns that could mean either mark ends of trajectories, not terminations.
        ends = [path for path in TRAJECTORY_ENDS if path in columns]
        if mapping.get("truncated") in TRAJECTORY_ENDS:
            ends = [str(paths.pop("truncated"))]
        paths["trajectory_end"] = ends[0] if ends else None
        marks = [p for p in NAMES["terminated"] if p in columns and p not in TRAJECTORY_ENDS]
        paths["terminated"] = marks[0] if marks and "terminated" not in mapping else None
    else:
        paths["terminated"] = _find(name, columns, mapping, "terminated")
    return {key: path for key, path in paths.items() if path is not None}


def _named(name: str, columns: Mapping[str, Column], key: str, path: str) -> str:
    """The column, or group of columns, that ``columns`` names for a key."""
    # LeRobot's names have dots, such as next.reward.
    for present in (path, path.replace(".", "/")):
        if _leaves(columns, present):
            return present
    raise DatasetError(
        f"{name}: columns maps {key} to {path!r}; the data has {', '.join(sorted(columns))}."
    )


def _find(
    name: str, columns: Mapping[str, Column], mapping: Mapping[str, str | None], key: str
) -> str | None:
    """The column (or group of columns) of a key."""
    if (path := mapping.get(key)) is not None:
        return _named(name, columns, key, path)
    if key in mapping:
        if key in ("observation", "action"):
            raise DatasetError(f"{name}: {key} cannot be left out.")
        return None
    matches = [path for path in NAMES[key] if _leaves(columns, path)]
    if key not in (*REQUIRED, "next_observation"):  # neither single numbers nor groups
        matches = [p for p in matches if p in columns and columns[p].shape]
    if key in ("not_terminated", "valid"):  # other kinds of columns may have these names
        matches = [p for p in matches if np.prod(columns[p].shape[1:]) == 1]
    if len(matches) > 1:
        raise DatasetError(
            f"{name}: {key} could be any of {', '.join(matches)}; choose with "
            f"columns={{{key!r}: ...}}."
        )
    if not matches and key in REQUIRED:
        raise DatasetError(
            f"{name}: no column for {key} among {', '.join(sorted(columns)) or 'nothing'}; name it "
            f"with columns={{{key!r}: ...}}.{_hint(key, columns)}"
        )
    return matches[0] if matches else None


def _hint(key: str, columns: Mapping[str, Column]) -> str:
    """What to do without a column for the key."""
    merged = [path for path in ("done", "dones", "next/done") if path in columns]
    if key == "terminated" and merged:
        more = (
            "; if rows terminate where 'next/success' is 1, name that, and None if none terminates"
        )
        return (
            f" {merged[0]!r} may merge termination with truncation: if it means termination "
            f"alone, name it in columns{more if 'next/success' in columns else ''}."
        )
    if key != "reward":
        return ""
    if "next/success" in columns:
        return " 'next/success' is 1 where the task is solved; it can be named as the reward."
    return (
        " Data recorded without a task has no rewards: load it for one single task (OGBench: "
        "load_dataset('ogbench/ENVIRONMENT-KIND-singletask-taskN-v0')); or compute the task's "
        "rewards, and which rows terminate, and pass a dict of arrays with both; or learn to reach "
        "any logged state: columns={'reward': None}, then dataset.relabelled()."
    )


def guess_observation_space(table: Table, key: Key = ("observation",)) -> gym.Space[Any]:
    """The space of the column ``key``, or of the columns below it."""
    if (column := table.columns.get(key)) is None:
        size = len(key)
        inner = dict.fromkeys(k[: size + 1] for k in table.observation if k[:size] == key)
        return gym.spaces.Dict({each[-1]: guess_observation_space(table, each) for each in inner})
    kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
    if kind.kind == "f":
        return gym.spaces.Box(-np.inf, np.inf, shape, kind.type)
    if kind == np.uint8 and len(shape) >= 2:
        return gym.spaces.Box(0, 255, shape, np.uint8)
    return _categories(table, key)


def _categories(table: Table, key: Key) -> gym.Space[Any]:
    """Discrete for integers ``(N,)`` or ``(N, 1)``, MultiDiscrete for ``(N, k)``.

    Categories of ``next`` count too: terminal states occur only there.
    """
    counts: Any = 0
    for side in (key, ("next", *key)):
        if (column := table.columns.get(side)) is None:
            continue
        kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
        if side != key and kind.kind not in "iu":
            continue  # ``BlockChecker`` refuses it, as another kind of numbers
        if kind.kind not in "iu" or len(shape) > 1:
            raise DatasetError(
                f"{table.name}: {dotted(side)} has {kind} values of row shape {shape}; expected "
                "floats, integer categories, or uint8 pictures."
            )
        values = np.asarray(column[:]).reshape(table.rows, -1)
        wrong = (values < 0) | (values >= MOST_CATEGORIES)
        if wrong.any():
            raise DatasetError(
                f"{table.name}: {dotted(side)} has the value {values[wrong][0]}, first at row "
                f"{wrong.any(axis=1).argmax()}, which is no category; expected numbers from 0 to "
                f"{MOST_CATEGORIES - 1:,}: number the categories from 0, or store numbers as floats."
            )
        counts = np.maximum(counts, values.max(axis=0).astype(np.int64) + 1)
    if len(counts) == 1:
        return gym.spaces.Discrete(int(counts[0]))
    return gym.spaces.MultiDiscrete(counts)


def guess_action_space(table: Table) -> tuple[gym.Space[Any], str, str]:
    """A space for the actions; a note on what was assumed, and a warning, or empty texts."""
    column, mask = table.columns[ACTION], table.columns.get(MASK)
    kind, shape, path = np.dtype(column.dtype), tuple(column.shape[1:]), table.paths["action"]
    if kind.kind != "f" and mask is not None and mask.shape[1:]:
        return gym.spaces.Discrete(int(mask.shape[1])), "", ""
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    encoded = True  # all rows are one whole number from 0 on, or one-hot
    for start in range(0, table.rows, CHUNK):
        block = np.asarray(column[start : start + CHUNK])
        low, high = np.fmin(low, block.min(0)), np.fmax(high, block.max(0))
        if encoded:
            rows = block.reshape(len(block), -1)
            single = rows.shape[1] == 1 or (rows.sum(axis=1) == 1).all()
            encoded = bool(single and (rows >= 0).all() and (rows == np.round(rows)).all())
    warning = note = ""
    if encoded and low.size == 1 and 1 <= high.max() < MOST_FLOAT_CATEGORIES:
        warning = (
            f"all actions ({path!r}) are whole numbers from {int(low.min())} to {int(high.max())} "
            "stored as floats, and were read as continuous. If they are discrete, convert them to "
            "integers of shape (N,): astype(int)."
        )
    elif encoded and low.size > 1 and table.rows > 1:
        warning = (
            f"each row of the actions ({path!r}) holds a single 1 and otherwise 0 in {low.size} "
            "columns, and was read as it stands. If these are discrete actions, pass their numbers: "
            "argmax(axis=1), integers of shape (N,)."
        )
    if kind.kind != "f":
        space = _categories(table, ACTION)
        note = f"action space taken from the largest logged action: {space}."
        return space, note, warning if low.size > 1 else ""
    if warning:
        low, high = np.minimum(low, -1), np.maximum(high, 1)
    elif low.min() >= -1 and high.max() <= 1:
        low, high = np.full(shape, -1), np.full(shape, 1)
        note = "action bounds taken as [-1, 1]; pass env= if they are others."
    else:
        warning = (
            f"actions reach {low.min():.6g} to {high.max():.6g} and no environment says what their "
            "bounds are; the data's own range per column is used: pass env=."
        )
    low, high = np.nan_to_num(low).astype(kind), np.nan_to_num(high).astype(kind)
    return gym.spaces.Box(low, high, shape, kind.type), note, warning


def text_as_floats(table: Table, spaces: Mapping[Key, gym.Space[Any]], dtype: torch.dtype) -> None:
    """Whole numbers of a table of text become floats where the space has these, by key.

    Raises ``DatasetError`` where ``dtype`` would round one.
    """
    for key, column in table.columns.items():
        space = spaces.get(key[1:] if key[0] == "next" else key)
        floats = isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f"
        if np.dtype(column.dtype).kind != "i" or not (floats or key == LOG_PROB):
            continue
        whole = np.asarray(column[:])
        table.columns[key] = values = whole.astype(str(dtype).removeprefix("torch."))
        if (lost := whole[values.astype(np.int64) != whole]).size:
            raise DatasetError(
                f"{table.name}: {dotted(key)} has the whole number {lost[0]}, which {dtype} would "
                "round; pass dtype=torch.float64, or store smaller numbers."
            )
