"""The columns of a table: recognised by their names, and checked to have one length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, check_numbers
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import DatasetError, Key

__all__ = ["TRAJECTORY_ENDS", "Table", "read_table"]

#: Names of columns that mark ends of trajectories in some files, terminations in others. In a file
#: that has ``not_terminated`` or ``valid`` they mark ends of trajectories.
TRAJECTORY_ENDS = ("terminals", "dones_float")
#: Keys without which there are no transitions.
REQUIRED = ("observation", "action", "reward", "terminated")

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


@dataclass(frozen=True)
class Table:
    """The columns under our names; observations by leaf key.

    ``columns`` has ``trajectory_end`` besides the keys of ``NAMES``: see ``TRAJECTORY_ENDS``.
    ``paths``: their names in the file. ``unused``: the file's other columns, by their names.
    """

    name: str
    rows: int
    observation: dict[Key, Column]
    next_observation: dict[Key, Column] | None
    columns: dict[str, Column]
    truncation_ignored: bool
    paths: dict[str, str]
    unused: dict[str, Column]

    def terminated(self) -> NDArray[np.bool_]:
        """Rows that terminate, ``(rows,)``: none where no column marks them."""
        not_terminated, terminated = self.flags("not_terminated"), self.flags("terminated")
        if not_terminated is None:
            return np.zeros(self.rows, np.bool_) if terminated is None else terminated
        if terminated is None:
            return ~not_terminated
        differ = np.flatnonzero(terminated == not_terminated)
        if len(differ):
            first, second = self.paths["not_terminated"], self.paths["terminated"]
            raise DatasetError(
                f"{self.name}: {first!r} (0 where a row terminates) and {second!r} (1 there) "
                f"disagree in {len(differ)} of {self.rows} rows, first at row {differ[0]}; choose "
                f"one with columns={{'terminated': {second!r}}} or "
                f"columns={{'not_terminated': {first!r}, 'terminated': None}}."
            )
        return terminated

    def flags(self, key: str) -> NDArray[np.bool_] | None:
        """A column of 0 and 1 as booleans, ``(rows,)``."""
        column = self.columns.get(key)
        if column is None:
            return None
        values = np.asarray(column[:]).reshape(self.rows)
        if values.dtype == np.bool_:
            return values
        wrong = np.flatnonzero((values != 0) & (values != 1))
        if len(wrong):
            raise DatasetError(
                f"{self.name}: {self.named(key)} has {values[wrong[0]]} in {len(wrong)} of "
                f"{self.rows} rows with other values than 0 and 1, first at row {wrong[0]}; "
                "expected 0 or 1."
            )
        return values.astype(np.bool_)

    def named(self, key: str) -> str:
        """The key, and its name in the file if that differs."""
        path = self.paths.get(key, key)
        return key if path == key else f"{key} ({path!r})"


def read_table(name: str, columns: dict[str, Column], options: ReadOptions) -> Table:
    unknown = set(options.columns) - set(NAMES)
    if unknown:
        raise DatasetError(
            f"{name}: columns maps {sorted(unknown)}; the keys are {', '.join(NAMES)}."
        )
    chosen = _columns_of_keys(name, columns, options)
    named, observation, following = _selected(name, columns, chosen)
    if not following:
        chosen["next_observation"] = None
    elif set(following) != set(observation):
        raise DatasetError(
            f"{name}: next_observation has the leaves {sorted(following)}, observation has "
            f"{sorted(observation)}; expected the same."
        )
    if options.columns.get("reward") and named["reward"].dtype == np.bool_:
        named["reward"] = np.asarray(named["reward"][:], np.float32)  # such as LeRobot's success
    check_numbers(name, {**named, **_joined(observation), **_joined(following, "next/")})
    rows = next(iter(observation.values())).shape[0]
    if rows == 0:
        raise DatasetError(f"{name}: observation has 0 rows; expected at least one transition.")
    _same_rows(name, rows, {**named, **_joined(observation), **_joined(following, "next/")})
    for key in (
        "reward", "terminated", "not_terminated", "truncated", "trajectory_end", "valid",
        "episode", "action_log_prob",
    ):  # fmt: skip
        if key in named and not _single(named[key]):
            raise DatasetError(
                f"{name}: {key} has shape {tuple(named[key].shape)}; expected one number a row, "
                f"({rows},) or ({rows}, 1)."
            )
    ignored = options.columns.get("truncated", "") is None
    paths = {key: path for key, path in chosen.items() if path is not None}
    unused = {path: column for path, column in columns.items() if path not in paths.values()}
    return Table(name, rows, observation, following or None, named, ignored, paths, unused)


def _selected(
    name: str, columns: dict[str, Column], chosen: Mapping[str, str | None]
) -> tuple[dict[str, Column], dict[Key, Column], dict[Key, Column]]:
    """Columns by key, and the leaves of ``observation`` and of ``next_observation``."""
    named: dict[str, Column] = {}
    observation: dict[Key, Column] = {}
    following: dict[Key, Column] = {}
    for key, path in chosen.items():
        if path is None:
            continue
        inner = {
            p[len(path) + 1 :]: c
            for p, c in columns.items()
            if p.startswith(f"{path}/") and c.shape
        }
        if key in ("observation", "next_observation"):
            leaves = observation if key == "observation" else following
            if path in columns:
                leaves[("observation",)] = columns[path]
            leaves.update({("observation", *p.split("/")): c for p, c in inner.items()})
        elif path in columns:
            named[key] = columns[path]
        else:
            raise DatasetError(
                f"{name}: {key} ({path!r}) is a group of {', '.join(inner)}; expected one array."
            )
    return named, observation, following


def _single(column: Column) -> bool:
    """One number a row."""
    return int(np.prod(column.shape[1:])) == 1


def _joined(columns: Mapping[Key, Column], prefix: str = "") -> dict[str, Column]:
    return {prefix + "/".join(key): column for key, column in columns.items()}


def _columns_of_keys(
    name: str, columns: dict[str, Column], options: ReadOptions
) -> dict[str, str | None]:
    """The column of each key of ``NAMES``, and of ``trajectory_end``."""
    mapping = dict(options.columns)
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
    chosen = {key: _find(name, key, columns, mapping) for key in NAMES if key != "terminated"}
    chosen["trajectory_end"] = None
    if not (chosen["not_terminated"] or (chosen["valid"] and "terminated" not in mapping)):
        chosen["terminated"] = _find(name, "terminated", columns, mapping)
        return chosen
    if mapping.get("truncated") in TRAJECTORY_ENDS:
        chosen["trajectory_end"], chosen["truncated"] = chosen["truncated"], None
    else:
        chosen["trajectory_end"] = next((p for p in TRAJECTORY_ENDS if p in columns), None)
    marks = [p for p in NAMES["terminated"] if p in columns and p not in TRAJECTORY_ENDS]
    chosen["terminated"] = marks[0] if marks and "terminated" not in mapping else None
    return chosen


def _find(
    name: str, key: str, columns: dict[str, Column], mapping: Mapping[str, str | None]
) -> str | None:
    """The column (or group of columns) of a key."""

    def present(path: str) -> bool:
        return path in columns or any(p.startswith(f"{path}/") for p in columns)

    listing = ", ".join(sorted(columns)) or "nothing"
    if key in mapping:
        path = mapping[key]
        if path is not None and not present(path) and present(path.replace(".", "/")):
            path = path.replace(".", "/")  # LeRobot's names, such as next.reward
        if path is not None and not present(path):
            raise DatasetError(f"{name}: columns maps {key} to {path!r}; the data has {listing}.")
        if path is None and key in REQUIRED and key != "terminated":
            raise DatasetError(f"{name}: {key} cannot be left out.")
        return path
    matches = [path for path in NAMES[key] if present(path)]
    if key not in (*REQUIRED, "next_observation"):  # neither single numbers nor groups
        matches = [p for p in matches if p in columns and columns[p].shape]
    if key in ("not_terminated", "valid"):  # other kinds of columns may have these names
        matches = [path for path in matches if path in columns and _single(columns[path])]
    if len(matches) > 1:
        raise DatasetError(
            f"{name}: {key} could be any of {', '.join(matches)}; choose with "
            f"columns={{{key!r}: ...}}."
        )
    if not matches and key in REQUIRED:
        raise DatasetError(
            f"{name}: no column for {key} among {listing}; name it with "
            f"columns={{{key!r}: ...}}.{_hint(name, key, columns)}"
        )
    return matches[0] if matches else None


def _hint(name: str, key: str, columns: Mapping[str, Column]) -> str:
    merged = [p for p in ("done", "dones", "next/done") if p in columns]
    solved = "next/success" in columns
    if key == "terminated" and merged:
        more = (
            "; if rows terminate where 'next/success' is 1, name that, and None if none terminates"
        )
        return (
            f" {merged[0]!r} may merge termination with truncation: if it means termination "
            f"alone, name it in columns{more if solved else ''}."
        )
    if key == "reward" and solved:
        return " 'next/success' is 1 where the task is solved; it can be named as the reward."
    if key == "reward":
        return (
            " Data recorded without a task has no rewards: load it for one single task (OGBench: "
            "load_dataset('ogbench/ENVIRONMENT-KIND-singletask-taskN-v0')), or compute the task's "
            "rewards, and which rows terminate, and pass a dict of arrays with both."
        )
    return ""


def _same_rows(name: str, rows: int, columns: Mapping[str, Column]) -> None:
    for key, column in columns.items():
        if column.shape[0] != rows:
            raise DatasetError(
                f"{name}: {key} has {column.shape[0]} rows, observation has {rows}; expected one row "
                "per step in every column."
            )
