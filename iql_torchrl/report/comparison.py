"""Compare runs: ``python -m iql_torchrl.report RUN... [--output FILE.png]``."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.evaluation.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)
from iql_torchrl.report.figures import Series, comparison_figure, save
from iql_torchrl.report.runs import (
    Group,
    all_series,
    common_values,
    find_runs,
    group_runs,
    grouped,
    labelled,
    note,
    read_run,
    series,
)
from iql_torchrl.report.tables import decimals, text_table

FloatArray = NDArray[np.float64]
#: The last evaluations by method and task; the runs of a task ``(runs,)``.
Scores = Mapping[str, Mapping[str, FloatArray]]

EVALUATED = ("return_mean", "score_mean")
TRAINING_COLUMNS = (
    "success_rate", "loss_actor", "loss_qvalue", "loss_value", "value_mean", "td_error_mean",
    "clip_fraction",
)  # fmt: skip
COMPARABLE = ("score_mean", "success_rate")  # between tasks; a return is not
BANDS = "Bands, 95 %: of several seeds over the seeds (Student's t), of one run over its episodes"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw runs side by side; those that differ only in their seed are one line."""

    runs: tuple[Path, ...]
    """folders of runs, or of several runs"""
    output: Path = Path("comparison.png")
    """picture, a name that ends in .png"""
    metrics: tuple[str, ...] = ()
    """columns of metrics.csv to draw"""
    each: bool = False
    """one line per run, also where only the seed differs"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and tabulate runs. Returns 0, or 2 after an error message."""
    import tyro  # takes a moment, and is not needed for training

    line = Annotated[Options, tyro.conf.PositionalRequiredArgs]
    options: Options = tyro.cli(line, prog="python -m iql_torchrl.report", args=arguments)
    try:
        if not options.runs:
            raise ValueError("no runs are given; give the folder of a run, or of several runs.")
        if options.output.suffix.lower() != ".png":
            raise ValueError(f"--output is {options.output}; expected a name that ends in .png.")
        runs = [read_run(folder) for folder in find_runs(options.runs)]
        for run in runs:
            if not run.rows:
                note(f"{run.folder} has no rows yet and is left out.")
        groups = group_runs([run for run in runs if run.rows], each=options.each)
        if not groups:
            raise ValueError("none of the runs has a row yet; wait for their first evaluation.")
        metrics = _metrics(options.metrics, groups)
        drawn = {name: all_series(groups, name) for name in metrics}
        _note_missing(groups, dict.fromkeys([*metrics, *EVALUATED]))
        if not any(drawn.values()):
            raise ValueError("there is nothing to draw: no run has a metric, or see the notes.")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save(comparison_figure(drawn, note=BANDS), options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(groups))
    name, scores = ("", {}) if options.each else method_scores(groups)
    if scores:
        print(f"\n{aggregate_table(scores, name=name)}")
    print(f"\nPicture: {options.output}")
    return 0


def compare(
    path: str | os.PathLike[str],
    runs: Mapping[str, Path],
    *,
    metric: str = "return_mean",
    reference: tuple[str, float] | None = None,
) -> None:
    """Draw one column of several runs, by label, to a PNG; ``reference``: a level and its label.

    Raises ``ValueError`` when none of the runs has the column.
    """
    groups = [Group(label, (read_run(folder),)) for label, folder in runs.items()]
    lines = all_series(groups, metric)
    if not lines:
        raise ValueError(f"none of {[str(folder) for folder in runs.values()]} has {metric!r}.")
    if reference is not None:
        ends = np.array([0.0, max(line.updates[-1] for line in lines)])
        lines.append(Series(reference[0], ends, np.full(2, reference[1])))
    save(comparison_figure({metric: lines}), path)


def _metrics(names: Sequence[str], groups: Sequence[Group]) -> list[str]:
    """The columns to draw: ``names``, or the evaluations, losses and values that exist."""
    columns = [{name for run in group.runs for row in run.rows for name in row} for group in groups]
    present = set().union(*columns) - {"update"}
    if not names:
        first = EVALUATED[all("score_mean" in each for each in columns)]
        usual = [name for name in (first, *TRAINING_COLUMNS) if name in present]
        return usual or sorted(present)
    for name in names:
        if name not in present:
            near = difflib.get_close_matches(name, present, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--metrics: no run has a column {name!r}; {hint}There are: "
                f"{', '.join(sorted(present))}."
            )
    return list(dict.fromkeys(names))


def _note_missing(groups: Sequence[Group], metrics: Iterable[str]) -> None:
    """Print to stderr which lines are missing although runs have their column."""
    for name in metrics:
        for group in groups:
            having = any(name in row for run in group.runs for row in run.rows)
            if having and series(group, name) is None:
                note(
                    f"{name} of {group.label} is missing: its runs share no update at which all have "
                    "a finite value. See them with --each."
                )


# -- the table of groups -----------------------------------------------------------------------------


def table(groups: Sequence[Group]) -> str:
    """One line per group: its runs, its last evaluation with interval, and its best one.

    Values are those of :func:`series`. The best of several evaluations is biased upwards: use the
    last for comparisons.
    """
    rows = [["", "runs", "updates", "evaluated at", "return", "score", "best evaluation"]]
    lines = {name: all_series(groups, name) for name in EVALUATED}
    places = {name: decimals(line.values[-1] for line in each) for name, each in lines.items()}
    for group in groups:
        shown = {name: series(group, name) for name in EVALUATED}
        used = EVALUATED[shown["score_mean"] is not None]
        evaluated = shown[used]
        first, last = min(r.updates for r in group.runs), max(r.updates for r in group.runs)
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                f"{last:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}",
                "-" if evaluated is None else f"{evaluated.updates[-1]:,.0f}",
                *("-" if each is None else _last(each, places[n]) for n, each in shown.items()),
                "-" if evaluated is None else _best(evaluated, places[used]),
            ]
        )
    if all(row[5] == "-" for row in rows[1:]):
        rows = [row[:5] + row[6:] for row in rows]
    return text_table(rows)


def _last(line: Series, places: int) -> str:
    low, high = (math.nan if bound is None else bound[-1] for bound in (line.low, line.high))
    return _with_interval(line.values[-1], low, high, places)


def _with_interval(value: float, low: float, high: float, places: int) -> str:
    interval = f" [{low:,.{places}f}, {high:,.{places}f}]" * math.isfinite(low + high)
    return f"{value:,.{places}f}{interval}"


def _best(line: Series, places: int) -> str:
    if np.isnan(line.values).all():
        return "-"
    at = int(np.nanargmax(line.values))
    return f"{line.values[at]:,.{places}f} at {line.updates[at]:,.0f}"


# -- methods over several tasks ----------------------------------------------------------------------


def method_scores(groups: Sequence[Group]) -> tuple[str, dict[str, dict[str, FloatArray]]]:
    """The column that is compared, and its last values by method and task.

    ``groups``: of runs that differ only in their seed. Runs whose settings differ only in
    ``dataset`` and ``seed`` are one method; the dataset is the task. The column is ``score_mean``,
    else ``success_rate``, whichever all groups have; with one task also ``return_mean``. A value is
    that of the last update at which all runs of its group have one.

    Empty where no column is comparable. Methods that lack a task, or have only one run of one, are
    left out with a note on stderr if others remain.
    """
    by_method: list[dict[str, Group]] = []
    for same in grouped(groups, _method).values():
        of_tasks: dict[str, Group] = {}
        for group in same:
            task = str(group.runs[0].settings.get("dataset", ""))
            of_tasks[f"{task} of {group.label}" if task in of_tasks else task] = group
        by_method.append(of_tasks)
    tasks = {task for of_tasks in by_method for task in of_tasks}
    columns = COMPARABLE if len(tasks) > 1 else (*COMPARABLE, "return_mean")
    name = next((n for n in columns if all(len(common_values(g, n)[0]) for g in groups)), None)
    if name is None:
        return "", {}
    runs = [[run for group in each.values() for run in group.runs] for each in by_method]
    labels = [group.label for group in labelled(runs, apart_from=("seed", "dataset", "data"))]
    scores, incomplete = {}, []
    for label, of_tasks in zip(labels, by_method, strict=True):
        last = {task: common_values(group, name)[1][:, -1] for task, group in of_tasks.items()}
        if set(last) == tasks and min(map(len, last.values())) > 1:
            scores[label] = {task: last[task] for task in sorted(tasks)}
        else:
            incomplete.append(label)
    for label in incomplete if scores else ():
        note(
            f"{label} is not compared over tasks: it needs two runs or more of each of "
            f"{', '.join(sorted(tasks))}."
        )
    return name, scores


def _method(group: Group) -> str:
    settings = group.runs[0].settings_without("seed", "dataset", "data")
    return json.dumps(settings, sort_keys=True) if settings else group.label


def aggregate_table(scores: Scores, *, name: str) -> str:
    """Interquartile mean of each method, and how probably the best one improves on each other.

    Both with 95 % intervals of the stratified bootstrap over runs (see
    :func:`~iql_torchrl.evaluation.statistics.stratified_interval`): of a new draw of seeds on the
    same tasks. ``scores``: at least one method; all have the same tasks in the same order.
    """
    tasks = {method: list(of_tasks.values()) for method, of_tasks in scores.items()}
    best = max(tasks, key=lambda method: float(interquartile_mean(*tasks[method])))
    count, places = len(tasks[best]), decimals(interquartile_mean(*each) for each in tasks.values())
    rows = [["", "runs", "interquartile mean", "probability"]]
    for method, arrays in tasks.items():
        mean, better = _estimated(interquartile_mean, arrays, places), "-"
        if method != best:
            better = _estimated(probability_of_improvement, [*tasks[best], *arrays], 3)
        rows.append([method, str(sum(map(len, arrays))), mean, better])
    text = f"Last {name} of all runs on {count} task{'s' * (count > 1)}, 95 % intervals over seeds"
    if len(tasks) == 1:
        rows = [row[:-1] for row in rows]
    else:
        text += f"; probability that a run of {best} is better"
    return f"{text}:\n{text_table(rows)}"


def _estimated(statistic: Callable[..., Any], samples: Sequence[FloatArray], places: int) -> str:
    low, high = stratified_interval(statistic, samples, seed=0)
    return _with_interval(float(statistic(*samples)), low, high, places)
