"""Runs as the report reads them: their folders, and groups of those that differ only in the seed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.config import IQLConfig
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.files import read_json
from iql_torchrl.report.figures import Series, column
from iql_torchrl.report.tables import read_csv

FloatArray = NDArray[np.float64]
T = TypeVar("T")
TABLE = "metrics.csv"


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """A run's folder, its settings (none without ``config.json``) and the rows of its table."""

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def updates(self) -> float:
        """The last update that has a row; -1 without rows."""
        return max((row["update"] for row in self.rows), default=-1.0)

    def settings_without(self, *names: str) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if name not in names}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; the label names the differences to other groups."""

    label: str
    runs: tuple[Run, ...]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders with a ``metrics.csv`` at or below each path, each once, sorted by name.

    Folders inside a run's folder are left out. Raises ``ValueError`` for a path without a run.
    """
    runs: dict[Path, Path] = {}  # by resolved path, so that no run is listed twice
    for path in paths:
        folders = {table.parent for table in path.rglob(TABLE)}
        if not folders:
            problem = "contains no run" if path.is_dir() else "is not a folder"
            raise ValueError(
                f"{path} {problem}: give folders with a {TABLE}, or a folder that contains them."
            )
        for folder in sorted(folders):
            if folders.isdisjoint(folder.parents):
                runs.setdefault(folder.resolve(), folder)
    return list(runs.values())


def read_run(folder: Path) -> Run:
    """A run whose settings are those of ``config.json``, else IQLConfig's defaults.

    Raises ``ValueError`` when ``config.json`` is not a JSON object or the table is damaged.
    """
    path = folder / "config.json"
    settings = read_json(path, {})
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} contains {settings!r}; expected an object with the run's settings."
        )
    defaults = IQLConfig().to_dict() if settings else {}  # an older version wrote fewer settings
    return Run(folder, {**settings, **defaults, **settings}, read_csv(folder / TABLE))


def grouped(runs: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Those of equal ``key`` together, in order of appearance."""
    groups: dict[str, list[T]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def group_runs(runs: Sequence[Run], *, each: bool = False) -> list[Group]:
    """Group runs that differ only in ``seed``, in order of appearance; ``each``: one run per group.

    Runs with the same settings, seed and data are not independent: only the one with the most
    updates (the last of equals) is kept, with a note on stderr. Where they have other data (rows or
    reward scaling, by the digest in ``config.json``), the runs of each data are a group. A run without
    settings or without a seed is a group of its own.
    """
    if each:
        return labelled([[run] for run in runs], apart_from=("data",))
    groups: list[list[Run]] = []
    for alike in grouped(runs, _settings_key).values():
        of_data = grouped(alike, lambda run: str(run.settings.get("data")))
        seeds = [seed for same in of_data.values() for seed in grouped(same, _seed)]
        groups += of_data.values() if len(set(seeds)) < len(seeds) else [alike]
    groups.sort(key=lambda alike: runs.index(alike[0]))
    used = [[_longest(same) for same in grouped(alike, _seed).values()] for alike in groups]
    return labelled(used, apart_from=("seed", "data"))


def _settings_key(run: Run) -> str:
    if "seed" not in run.settings:
        return str(run.folder.resolve())
    return json.dumps(run.settings_without("seed", "data"), sort_keys=True)


def _seed(run: Run) -> str:
    return str(run.settings.get("seed"))


def _longest(runs: Sequence[Run]) -> Run:
    used = max(reversed(runs), key=lambda run: run.updates)
    for run in runs:
        if run is not used:
            note(f"{run.folder} is left out: {used.folder} has its settings and its seed.")
    return used


def labelled(groups: Sequence[Sequence[Run]], *, apart_from: Sequence[str]) -> list[Group]:
    """Labels: the settings that differ between groups, and folders where labels would be equal.

    A folder is given by its name, or by its path where another group has that name.

    The settings ``apart_from`` are not named: runs of one group may differ in them. Where all groups
    have the settings that differ, they are sorted by them, numbers as numbers.
    """
    settings = [runs[0].settings_without(*apart_from) for runs in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    saved = [each for each in settings if each]
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in saved}) > 1]
    differing.sort(key="seed".__eq__)  # the seed is named last
    if all(each.keys() >= set(differing) for each in settings):
        groups = sorted(groups, key=lambda runs: [_order(runs[0].settings[k]) for k in differing])
    names = [runs[0].name for runs in groups]
    labels, folders = [], []
    for name, (first, *others) in zip(names, groups, strict=True):
        folder = name if names.count(name) == 1 else str(first.folder)
        folders.append(folder + f" and {len(others)} more" * bool(others))
        given = [key for key in differing if key in first.settings]
        named = [f"{key.replace('_', ' ')} {_shown(first.settings[key])}" for key in given]
        labels.append(", ".join(named) or folders[-1])
    return [
        Group(label if labels.count(label) == 1 else f"{label}, {folder}", tuple(runs))
        for label, folder, runs in zip(labels, folders, groups, strict=True)
    ]


def _order(value: object) -> tuple[bool, Any]:
    """A key that sorts numbers by value, and before texts."""
    number = isinstance(value, int | float)
    return not number, value if number else str(value)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "x".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def series(group: Group, name: str) -> Series | None:
    """The group's line for a column; None where there is nothing to draw.

    One run: its values and recorded interval. Several: the mean over runs and its 95 % t-interval,
    at the updates where every run that has the column has a finite value; no interval where only
    one of them has it.
    """
    lines = _columns(group, name)
    if not lines:
        return None
    if len(group.runs) == 1:
        return replace(lines[0], label=group.label)
    having = f"{len(lines)} of " * (len(lines) < len(group.runs))
    label = f"{group.label} ({having}{len(group.runs)} seeds)"
    if len(lines) == 1:
        return Series(label, lines[0].updates, lines[0].values)
    updates, values = common_values(group, name)
    return Series(label, updates, *mean_interval(values)) if len(updates) else None


def all_series(groups: Sequence[Group], name: str) -> list[Series]:
    lines = [series(group, name) for group in groups]
    return [line for line in lines if line is not None]


def common_values(group: Group, name: str) -> tuple[FloatArray, FloatArray]:
    """Updates ``(points,)`` at which every run that has the column has a finite value, and these
    values ``(runs, points)``; no points where there is no such update."""
    tables = [
        {u: v for u, v in zip(line.updates, line.values, strict=True) if math.isfinite(v)}
        for line in _columns(group, name)
    ]
    updates = sorted(set.intersection(*map(set, tables))) if tables else []
    values = np.array([[table[u] for u in updates] for table in tables], dtype=np.float64)
    return np.array(updates, dtype=np.float64), values


def _columns(group: Group, name: str) -> list[Series]:
    """The column of each run that has it."""
    lines = [column(run.rows, name) for run in group.runs]
    return [line for line in lines if len(line.values)]
