"""The columns of a table: their names, their shapes, and the spaces they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, JoinedColumns
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import DatasetError, Key, leaf_spaces
from iql_torchrl.descriptions import describe_space

Flags: TypeAlias = NDArray[np.bool_]
#: Names of columns that mark ends of trajectories in some files, terminations in others. In a file
#: that has ``not_terminated`` or ``valid`` they mark ends of trajectories.
TRAJECTORY_ENDS = ("terminals", "dones_float")
#: Keys without which there are no transitions.
REQUIRED = ("observation", "action", "reward", "terminated")

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
    """The columns under our names; observations by leaf key.

    ``flags``: for each of ``FLAGS`` a mark in each row, ``(rows,)``; where the file has none, all rows
    are valid and no other mark is set. ``paths``: the columns' names in the file. ``unused``: its other
    columns, by their names.
    """

    name: str
    rows: int
    observation: dict[Key, Column]
    next_observation: dict[Key, Column] | None
    columns: dict[str, Column]
    flags: dict[str, Flags]
    paths: dict[str, str]
    unused: dict[str, Column]


@dataclass(frozen=True)
class Ends:
    """Marks of a table's rows, each ``(rows,)``.

    Attributes:
        terminated: the row terminates: the value of its successor is 0.
        truncated: the row is the last of its trajectory for another reason.
        last: the last row of each trajectory, including rows that are not transitions.
        valid: False at rows that are not transitions and only contain the last next observation.
        broken: the row's ``next_observation`` is not the following row's observation, ``(rows -
            1,)``; None without ``next_observation``.
    """

    terminated: Flags
    truncated: Flags
    last: Flags
    valid: Flags
    broken: Flags | None


def read_table(name: str, columns: dict[str, Column], options: ReadOptions) -> Table:
    """The columns by our keys, each with one row of numbers a step; raises ``DatasetError``."""
    columns = _with_joined(name, columns, options)
    paths = _paths(name, columns, options.named)
    named: dict[str, Column] = {}
    observed: dict[str, dict[Key, Column]] = {"observation": {}, "next_observation": {}}
    for key, path in paths.items():
        leaves = {
            ("observation", *p.removeprefix(path).split("/")[1:]): column
            for p, column in columns.items()
            if p == path or (p.startswith(f"{path}/") and column.shape)
        }
        if key in observed:
            observed[key] = leaves
        elif path in columns:
            named[key] = columns[path]
        else:
            inner = ", ".join("/".join(leaf[1:]) for leaf in leaves)
            raise DatasetError(
                f"{name}: {key} ({path!r}) is a group of {inner}; expected one array."
            )
    observation, following = observed["observation"], observed["next_observation"]
    if not following:
        paths.pop("next_observation", None)
    elif set(following) != set(observation):
        raise DatasetError(
            f"{name}: next_observation has the leaves {sorted(following)}, observation has "
            f"{sorted(observation)}; expected the same."
        )
    if options.columns.get("reward") and named["reward"].dtype == np.bool_:
        named["reward"] = np.asarray(named["reward"][:], np.float32)  # such as LeRobot's success
    if "reward" not in named:  # left out: data without a task
        named["reward"] = np.zeros(next(iter(observation.values())).shape[0], np.float32)
    every = {"/".join(key): column for key, column in observation.items()}
    every |= {"next/" + "/".join(key): column for key, column in following.items()}
    rows = _checked_rows(name, every | named)
    return Table(
        name, rows, observation, following or None, named, _flags(name, rows, named, paths), paths,
        unused={path: column for path, column in columns.items() if path not in paths.values()},
    )  # fmt: skip


def _with_joined(name: str, columns: dict[str, Column], options: ReadOptions) -> dict[str, Column]:
    """With a column for each list of names in ``options.columns``."""
    joined = {}
    for key, path in options.named.items():
        listed = options.columns[key]
        if listed is None or isinstance(listed, str):
            continue
        parts: list[Column] = []
        for each in listed:
            column = columns.get(each, columns.get(each.replace(".", "/")))
            if column is None:
                raise DatasetError(
                    f"{name}: columns maps {key} to {each!r} among others; the data has "
                    f"{', '.join(sorted(columns))}."
                )
            rows, kind = tuple(column.shape[:1]), np.dtype(column.dtype)
            alike = not parts or rows == tuple(parts[0].shape[:1])
            if not (rows and alike and _single(column) and kind.kind in "biuf"):
                raise DatasetError(
                    f"{name}: columns maps {key} to {each!r} among others, which has {kind} values "
                    f"of shape {tuple(column.shape)}; expected one number a row, in as many rows."
                )
            parts.append(column)
        joined[str(path)] = JoinedColumns(parts)
    return {**columns, **joined}


def _checked_rows(name: str, columns: Mapping[str, Column]) -> int:
    """The number of rows; raises unless each column, the first an observation, has numbers in each."""
    rows = -1
    for key, column in columns.items():
        shape, kind = tuple(column.shape), np.dtype(column.dtype)
        rows = shape[0] if rows < 0 and shape else rows
        if not shape:
            problem = f"is a single value of dtype {kind}"
        elif kind.kind == "O":
            problem = "has Python objects (dtype object): rows of different lengths, or no numbers"
        elif kind.kind not in "biuf":
            problem = f"has {kind} values of shape {shape}"
        elif 0 in shape[1:]:
            problem = f"has shape {shape}: its rows hold no numbers"
        elif shape[0] != rows:
            problem = f"has {shape[0]} rows, observation has {rows}"
        elif key in SINGLE and not _single(column):
            problem = f"has shape {shape}, where ({rows},) or ({rows}, 1) is needed"
        else:
            continue
        raise DatasetError(
            f"{name}: {key} {problem}; expected an array of real numbers or booleans with one row per "
            "step, all rows of one shape. Join episodes of different lengths with numpy.concatenate "
            "and mark their ends."
        )
    if not rows:
        raise DatasetError(f"{name}: observation has 0 rows; expected at least one transition.")
    return rows


def _single(column: Column) -> bool:
    """One number a row."""
    return int(np.prod(column.shape[1:])) == 1


def _flags(
    name: str, rows: int, columns: Mapping[str, Column], paths: Mapping[str, str]
) -> dict[str, Flags]:
    flags = {}
    for key in FLAGS:
        values = np.ravel(columns[key][:]) if key in columns else np.full(rows, key == "valid")
        if len(wrong := np.flatnonzero((values != 0) & (values != 1))):
            raise DatasetError(
                f"{name}: {key} ({paths[key]!r}) has {values[wrong[0]]} in {len(wrong)} of {rows} rows "
                f"with other values than 0 and 1, first at row {wrong[0]}; expected 0 or 1."
            )
        flags[key] = values.astype(np.bool_)
    if "not_terminated" not in columns:
        return flags
    opposite = ~flags["not_terminated"]
    if "terminated" in columns and len(differ := np.flatnonzero(flags["terminated"] != opposite)):
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


def _find(
    name: str, columns: Mapping[str, Column], mapping: Mapping[str, str | None], key: str
) -> str | None:
    """The column (or group of columns) of a key."""
    present = {
        "/".join(path.split("/")[:n]) for path in columns for n in range(1, path.count("/") + 2)
    }
    listing = ", ".join(sorted(columns)) or "nothing"
    if (named := mapping.get(key)) is not None:
        # LeRobot's names have dots, such as next.reward.
        for path in (named, named.replace(".", "/")):
            if path in present:
                return path
        raise DatasetError(f"{name}: columns maps {key} to {named!r}; the data has {listing}.")
    if key in mapping:
        if key in REQUIRED and key not in ("reward", "terminated"):
            raise DatasetError(f"{name}: {key} cannot be left out.")
        return None
    matches = [path for path in NAMES[key] if path in present]
    if key not in (*REQUIRED, "next_observation"):  # neither single numbers nor groups
        matches = [p for p in matches if p in columns and columns[p].shape]
    if key in ("not_terminated", "valid"):  # other kinds of columns may have these names
        matches = [p for p in matches if _single(columns[p])]
    if len(matches) > 1:
        raise DatasetError(
            f"{name}: {key} could be any of {', '.join(matches)}; choose with "
            f"columns={{{key!r}: ...}}."
        )
    if not matches and key in REQUIRED:
        raise DatasetError(
            f"{name}: no column for {key} among {listing}; name it with "
            f"columns={{{key!r}: ...}}.{_hint(key, columns)}"
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


def guess_observation_space(table: Table) -> gym.Space[Any]:
    """A space per leaf; the number of categories includes those of ``next_observation``."""
    spaces: dict[Key, gym.Space[Any]] = {}
    for key, column in table.observation.items():
        columns = {"/".join(key): column}
        if table.next_observation is not None:  # terminal states occur only there
            following = table.next_observation[key]
            if np.dtype(following.dtype).kind in "iu" and following.shape == column.shape:
                columns["next/" + "/".join(key)] = following
        kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
        if kind.kind == "f":
            spaces[key] = gym.spaces.Box(-np.inf, np.inf, shape, kind.type)
        elif kind == np.uint8 and len(shape) >= 2:
            spaces[key] = gym.spaces.Box(0, 255, shape, np.uint8)
        else:
            spaces[key] = _categories(table, columns)
    return spaces[("observation",)] if ("observation",) in spaces else _nested(spaces)


def _nested(spaces: dict[Key, gym.Space[Any]]) -> gym.Space[Any]:
    children: dict[str, Any] = {}
    for name in dict.fromkeys(key[1] for key in spaces):
        inner = {key[1:]: space for key, space in spaces.items() if key[1] == name}
        children[name] = inner[(name,)] if (name,) in inner else _nested(inner)
    return gym.spaces.Dict(children)


def _categories(table: Table, columns: Mapping[str, Column]) -> gym.Space[Any]:
    """Discrete for integers ``(N,)`` or ``(N, 1)``, MultiDiscrete for ``(N, k)``, for all columns."""
    counts: Any = 0
    for key, column in columns.items():
        kind, shape = np.dtype(column.dtype), tuple(column.shape[1:])
        if kind.kind not in "iu" or len(shape) > 1:
            raise DatasetError(
                f"{table.name}: {key} has {kind} values of row shape {shape}; expected floats, integer "
                "categories, or uint8 pictures."
            )
        values = np.asarray(column[:]).reshape(table.rows, -1)
        wrong = (values < 0) | (values >= MOST_CATEGORIES)
        if wrong.any():
            raise DatasetError(
                f"{table.name}: {key} has the value {values[wrong][0]}, first at row "
                f"{wrong.any(axis=1).argmax()}, which is no category; expected numbers from 0 to "
                f"{MOST_CATEGORIES - 1:,}: number the categories from 0, or store numbers as floats."
            )
        counts = np.maximum(counts, values.max(axis=0).astype(np.int64) + 1)
    if len(counts) == 1:
        return gym.spaces.Discrete(int(counts[0]))
    return gym.spaces.MultiDiscrete(counts)


def guess_action_space(table: Table) -> tuple[gym.Space[Any], str, str]:
    """A space for the actions; a note on what was assumed, and a warning, or empty texts."""
    column, mask = table.columns["action"], table.columns.get("action_mask")
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
        space = _categories(table, {"action": column})
        note = f"action space taken from the largest logged action: {space}."
        return space, note, "" if _single(column) else warning
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


def fit_to_spaces(
    table: Table,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    text_as: torch.dtype | None,
) -> None:
    """Raises unless every column has its space's row shape.

    With ``text_as`` the table is of text, in which whole numbers may mean floats: they become floats
    where the space has these, unless ``text_as`` would round one.
    """
    leaves = leaf_spaces(observation_space)
    if set(leaves) != set(table.observation):
        raise DatasetError(
            f"{table.name}: the data's observation has the leaves {sorted(table.observation)}, the "
            f"environment's {sorted(leaves)}; expected the same."
        )
    places: list[tuple[str, dict[Any, Column], Any, gym.Space[Any]]] = [
        ("action", table.columns, "action", action_space)
    ]
    for prefix, columns in (("", table.observation), ("next/", table.next_observation or {})):
        places += [(prefix + "/".join(key), columns, key, leaves[key]) for key in columns]
    if (log_prob := table.columns.get("action_log_prob")) is not None:
        numbers = gym.spaces.Box(-np.inf, 0, log_prob.shape[1:])
        places.append(("action_log_prob", table.columns, "action_log_prob", numbers))
    for name, columns, key, space in places:
        shape, expected = tuple(columns[key].shape[1:]), tuple(space.shape or ())
        if shape != expected and (shape, expected) != ((1,), ()):
            raise DatasetError(
                f"{table.name}: {name} has rows of shape {shape} in {table.rows} rows; expected "
                f"{expected} for {describe_space(space)}."
            )
        if text_as and isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f":
            columns[key] = _as_floats(f"{table.name}: {name}", columns[key], text_as)
    if (mask := table.columns.get("action_mask")) is not None:
        count = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else None
        if tuple(mask.shape[1:]) != (count,):
            raise DatasetError(
                f"{table.name}: action_mask has rows of shape {tuple(mask.shape[1:])}; expected one "
                f"entry per action of {action_space}."
            )


def _as_floats(name: str, column: Column, dtype: torch.dtype) -> Column:
    whole = np.asarray(column[:])
    if whole.dtype.kind != "i":
        return column
    values: NDArray[Any] = whole.astype(str(dtype).removeprefix("torch."))
    if (lost := whole[values.astype(np.int64) != whole]).size:
        raise DatasetError(
            f"{name} has the whole number {lost[0]}, which {dtype} would round; pass "
            "dtype=torch.float64, or store smaller numbers."
        )
    return values
