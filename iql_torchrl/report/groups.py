"""Groups of runs that differ only in their seed, and the line of a group for one column."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.config import IQLConfig
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.report.figures import Series, column
from iql_torchrl.report.runs import Run

__all__ = ["Group", "common_values", "group_runs", "labelled", "series", "settings_of"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; the label names the differences to other groups."""

    label: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run], *, each: bool = False) -> list[Group]:
    """Group runs that differ only in ``seed``, in order of appearance; ``each``: one run per group.

    Runs with the same settings and the same seed are not independent: only the one with the most
    updates (the last of equals) is kept, with a note on stderr. A run without settings or without a
    seed is a group of its own. Settings that a file lacks have IQLConfig's defaults.
    """
    if each:
        return labelled([[run] for run in runs], apart_from=())
    by_settings: dict[str, dict[str, Run]] = {}  # the runs by seed, for each key of settings
    for run in runs:
        settings = settings_of(run)
        seed = json.dumps(settings.pop("seed", None))
        alone = "seed" not in run.settings
        key = str(run.folder.resolve()) if alone else json.dumps(settings, sort_keys=True)
        by_seed = by_settings.setdefault(key, {})
        used, dropped = run, by_seed.get(seed)
        if dropped is not None:
            if used.updates < dropped.updates:
                used, dropped = dropped, used
            print(
                f"note: {dropped.folder} is left out: {used.folder} has its settings and its seed.",
                file=sys.stderr,
            )
        by_seed[seed] = used
    return labelled([list(runs.values()) for runs in by_settings.values()], apart_from=("seed",))


def settings_of(run: Run) -> dict[str, Any]:
    """The run's settings, ``dataset`` first, and defaults for fields that its version lacked."""
    missing = {k: v for k, v in IQLConfig().to_dict().items() if k not in run.settings}
    return run.settings | missing if run.settings else {}


def labelled(groups: Sequence[Sequence[Run]], *, apart_from: Sequence[str]) -> list[Group]:
    """Labels: the settings that differ between groups, and folders where labels would be equal.

    The settings ``apart_from`` are not named: runs of one group may differ in them.
    """
    settings = [settings_of(runs[0]) for runs in groups]
    saved = [each for each in settings if each]
    differing = [
        key
        for key in dict.fromkeys(key for each in saved for key in each)
        if key not in apart_from and len({json.dumps(each.get(key)) for each in saved}) > 1
    ]
    differing.sort(key="seed".__eq__)  # the seed is named last
    labels = []
    for runs, each in zip(groups, settings, strict=True):
        named = [f"{key.replace('_', ' ')} {_shown(each[key])}" for key in differing if key in each]
        labels.append(", ".join(named) or _folders(runs))
    return [
        Group(label if labels.count(label) == 1 else f"{label}, {_folders(runs)}", tuple(runs))
        for label, runs in zip(labels, groups, strict=True)
    ]


def _folders(runs: Sequence[Run]) -> str:
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return runs[0].name + more


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
    label = f"{group.label} ({len(group.runs)} seeds)"
    if len(lines) == 1:
        return Series(label, lines[0].updates, lines[0].values)
    updates, values = common_values(group, name)
    return Series(label, updates, *mean_interval(values)) if len(updates) else None


def common_values(group: Group, name: str) -> tuple[FloatArray, FloatArray]:
    """Updates ``(points,)`` at which every run that has the column has a finite value, and these
    values ``(runs, points)``; no points where there is no such update."""
    tables = [
        {u: v for u, v in zip(line.updates, line.values, strict=True) if math.isfinite(v)}
        for line in _columns(group, name)
    ]
    updates = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = np.array([[table[u] for u in updates] for table in tables], dtype=np.float64)
    return np.array(updates, dtype=np.float64), values


def _columns(group: Group, name: str) -> list[Series]:
    """The column of each run that has it."""
    lines = [column(run.rows, name) for run in group.runs]
    return [line for line in lines if len(line.values)]
