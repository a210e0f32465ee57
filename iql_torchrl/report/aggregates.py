"""Methods compared over tasks and seeds: interquartile mean and probability of improvement."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.evaluation.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)
from iql_torchrl.report.groups import Group, common_values, labelled, settings_of
from iql_torchrl.report.runs import Run

__all__ = ["aggregate_table", "method_scores"]

FloatArray = NDArray[np.float64]
#: The last evaluations by method and task; the runs of a task ``(runs,)``.
Scores = Mapping[str, Mapping[str, FloatArray]]

#: Columns that are comparable between tasks; a return is not.
COMPARABLE = ("score_mean", "success_rate")
SEED = 0  # of the resamples


def method_scores(groups: Sequence[Group]) -> tuple[str, dict[str, dict[str, FloatArray]]]:
    """The column that is compared, and its last values by method and task.

    ``groups``: of runs that differ only in their seed. Runs whose settings differ only in
    ``dataset`` and ``seed`` are one method; the dataset is the task. The column is ``score_mean``,
    else ``success_rate``, whichever all groups have; with one task also ``return_mean``. A value is
    that of the last update at which all runs of its group have one.

    Empty where no column is comparable. Methods that lack a task, or have only one run of one, are
    left out with a note on stderr if others remain.
    """
    by_method: dict[str, dict[str, Group]] = {}
    for group in groups:
        settings = settings_of(group.runs[0])
        task = str(settings.pop("dataset", ""))
        settings.pop("seed", None)
        key = json.dumps(settings, sort_keys=True) if settings else group.label
        by_method.setdefault(key, {})[task] = group
    tasks = {task for of_tasks in by_method.values() for task in of_tasks}
    columns = COMPARABLE if len(tasks) > 1 else (*COMPARABLE, "return_mean")
    name = next((n for n in columns if all(len(common_values(g, n)[0]) for g in groups)), None)
    if name is None:
        return "", {}
    runs: list[list[Run]] = [[r for g in m.values() for r in g.runs] for m in by_method.values()]
    labels = [group.label for group in labelled(runs, apart_from=("seed", "dataset"))]
    scores, incomplete = {}, []
    for label, of_tasks in zip(labels, by_method.values(), strict=True):
        last = {task: common_values(group, name)[1][:, -1] for task, group in of_tasks.items()}
        if set(last) == tasks and min(map(len, last.values())) > 1:
            scores[label] = {task: last[task] for task in sorted(tasks)}
        else:
            incomplete.append(label)
    for label in incomplete if scores else ():
        print(
            f"note: {label} is not compared over tasks: it needs two runs or more of each of "
            f"{', '.join(sorted(tasks))}.",
            file=sys.stderr,
        )
    return name, scores


def aggregate_table(scores: Scores, *, name: str) -> str:
    """Interquartile mean of each method, and how probably the best one improves on each other.

    Both with 95 % intervals of the stratified bootstrap over runs (see
    :func:`~iql_torchrl.evaluation.statistics.stratified_interval`): of a new draw of seeds on the
    same tasks. ``scores``: at least one method; all have the same tasks in the same order.
    """
    tasks = {method: list(of_tasks.values()) for method, of_tasks in scores.items()}
    means = {method: float(interquartile_mean(*arrays)) for method, arrays in tasks.items()}
    width = max(map(len, scores))
    count = len(next(iter(tasks.values())))
    lines = [
        f"Last {name} of all runs on {count} task{'s' * (count > 1)}, 95 % intervals over seeds:",
        f"{'':{width}}  {'runs':>5}  interquartile mean",
    ]
    for method, arrays in tasks.items():
        shown = _with_interval(means[method], interquartile_mean, arrays)
        lines.append(f"{method:{width}}  {sum(map(len, arrays)):5d}  {shown}")
    best = max(means, key=means.__getitem__)
    if len(tasks) > 1:
        lines.append(f"Probability that a run of {best} is better than one of")
    for method, arrays in tasks.items():
        if method != best:
            both = [*tasks[best], *arrays]
            value = float(probability_of_improvement(*both))
            shown = _with_interval(value, probability_of_improvement, both)
            lines.append(f"{method:{width}}  {'':5}  {shown}")
    return "\n".join(lines)


def _with_interval(
    value: float, statistic: Callable[..., Any], samples: Sequence[FloatArray]
) -> str:
    low, high = stratified_interval(statistic, samples, seed=SEED)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"
