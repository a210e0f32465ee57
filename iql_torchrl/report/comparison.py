"""Compare runs: ``python -m iql_torchrl.report RUN... [--output FILE.png]``."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.config import IQLConfig
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.report.figures import Series, column, comparison_figure, draw, save
from iql_torchrl.report.runs import TABLE, Run, find_runs, read_run

__all__ = [
    "Group",
    "draw",
    "group_runs",
    "main",
    "series",
    "table",
]

FloatArray = NDArray[np.float64]

EVALUATED = ("return_mean", "score_mean")
OTHERS = ("success_rate", "loss_actor", "loss_qvalue", "loss_value", "value_mean")
WIDEST_LABEL = 48
NOTE = "Bands, 95 %: of several seeds over the seeds (Student's t), of one run over its episodes"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; the label says how they differ from other groups."""

    label: str
    runs: tuple[Run, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and tabulate runs. Returns 0, or 2 after an error message."""
    options = _parser().parse_args(arguments)
    try:
        if options.output.suffix.lower() != ".png":
            raise ValueError(f"--output is {options.output}; expected a name that ends in .png.")
        runs = [read_run(folder) for folder in find_runs(options.runs)]
        groups = group_runs(_with_rows(runs), each=options.each)
        metrics = _metrics(options.metrics, groups)
        panels = {name: [series(group, name) for group in groups] for name in metrics}
        drawn = {name: [s for s in lines if s is not None] for name, lines in panels.items()}
        _note_gaps(groups, dict.fromkeys([*metrics, *EVALUATED]))
        if not any(drawn.values()):
            raise ValueError("there is nothing to draw: no run has a metric, or see the notes.")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save(comparison_figure(drawn, note=NOTE), options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(groups))
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
    lines = [line for group in groups if (line := series(group, metric)) is not None]
    if not lines:
        raise ValueError(f"none of {[str(folder) for folder in runs.values()]} has {metric!r}.")
    if reference is not None:
        ends = np.array([0.0, max(line.updates[-1] for line in lines)])
        lines.append(Series(reference[0], ends, np.full(2, reference[1])))
    save(comparison_figure({metric: lines}), path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m iql_torchrl.report",
        description="Draw runs side by side; those that differ only in their seed are one line.",
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, or one that contains runs",
    )
    add("--output", type=Path, default=Path("comparison.png"), metavar="FILE.png")
    add("--metrics", nargs="+", metavar="NAME", help=f"columns of {TABLE}, one panel each")
    add(
        "--each",
        action="store_true",
        help="one line per run, also for runs that differ only in their seed",
    )
    return parser


def _with_rows(runs: Sequence[Run]) -> list[Run]:
    for run in runs:
        if not run.rows:
            print(f"note: {run.folder} has no rows yet and is left out.", file=sys.stderr)
    started = [run for run in runs if run.rows]
    if not started:
        raise ValueError("none of the runs has a row yet; wait for their first evaluation.")
    return started


def _metrics(names: Sequence[str] | None, groups: Sequence[Group]) -> list[str]:
    """The columns to draw: ``names``, or the evaluations, losses and values that exist."""
    rows = [row for group in groups for run in group.runs for row in run.rows]
    present = {name for row in rows for name in row} - {"update"}
    if names is None:
        scored = all(_column_exists(group, "score_mean") for group in groups)
        first = "score_mean" if scored else "return_mean"
        known = [name for name in (first, *OTHERS) if name in present]
        return known or sorted(present)
    for name in names:
        if name not in present:
            near = difflib.get_close_matches(name, present, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--metrics: no run has a column {name!r}; {hint}There are: "
                f"{', '.join(sorted(present))}."
            )
    return list(dict.fromkeys(names))


def _column_exists(group: Group, name: str) -> bool:
    return any(name in row for run in group.runs for row in run.rows)


def _note_gaps(groups: Sequence[Group], metrics: Iterable[str]) -> None:
    """Print to stderr what is missing from a group's lines and from its numbers in the table."""
    for name in metrics:
        for group in groups:
            having = sum(any(name in row for row in run.rows) for run in group.runs)
            if 0 < having < len(group.runs):
                print(
                    f"note: {name} of {group.label} is from {having} of its {len(group.runs)} runs; "
                    "the others have none.",
                    file=sys.stderr,
                )
            if having and series(group, name) is None:
                print(
                    f"note: {name} of {group.label} is missing: its runs share no update at which "
                    "all have a finite value. See them with --each.",
                    file=sys.stderr,
                )


def group_runs(runs: Sequence[Run], *, each: bool = False) -> list[Group]:
    """Group runs that differ only in ``seed``, in order of appearance; ``each``: one run per group.

    Runs with the same settings and the same seed are not independent: only the one with the most
    updates (the last of equals) is kept, with a note on stderr. A run without settings or without a
    seed is a group of its own. Settings that a file lacks have IQLConfig's defaults.
    """
    if each:
        return _labelled([[run] for run in runs], with_seed=True)
    by_settings: dict[str, dict[str, Run]] = {}  # the runs by seed, for each key of settings
    for run in runs:
        settings = _settings(run)
        seed = json.dumps(settings.pop("seed", None))
        alone = "seed" not in run.settings
        key = str(run.folder.resolve()) if alone else json.dumps(settings, sort_keys=True)
        same = by_settings.setdefault(key, {})
        kept, dropped = run, same.get(seed)
        if dropped is not None:
            if kept.updates < dropped.updates:
                kept, dropped = dropped, kept
            print(
                f"note: {dropped.folder} is left out: {kept.folder} has its settings and its seed.",
                file=sys.stderr,
            )
        same[seed] = kept
    return _labelled([list(same.values()) for same in by_settings.values()], with_seed=False)


def _settings(run: Run) -> dict[str, Any]:
    """The run's settings, ``dataset`` first, and defaults for fields that its version lacked."""
    missing = {k: v for k, v in IQLConfig().to_dict().items() if k not in run.settings}
    return run.settings | missing if run.settings else {}


def _labelled(groups: Sequence[Sequence[Run]], *, with_seed: bool) -> list[Group]:
    """Labels: the settings that differ between groups, and folders where labels would be equal."""
    settings = [_settings(runs[0]) for runs in groups]
    known = [each for each in settings if each]
    differing = [
        key
        for key in dict.fromkeys(key for each in known for key in each if key != "seed")
        if len({json.dumps(each.get(key)) for each in known}) > 1
    ]
    if with_seed and len({json.dumps(each.get("seed")) for each in known}) > 1:
        differing.append("seed")
    labels = []
    for runs, each in zip(groups, settings, strict=True):
        named = [f"{key.replace('_', ' ')} {_shown(each[key])}" for key in differing if key in each]
        labels.append(", ".join(named) or _folders(runs))
    return [
        Group(label if labels.count(label) == 1 else f"{label}, {_folders(runs)}", tuple(runs))
        for label, runs in zip(labels, groups, strict=True)
    ]


def _folders(runs: Sequence[Run]) -> str:
    others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return runs[0].name + others


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
    lines = [column(run.rows, name) for run in group.runs]
    lines = [line for line in lines if len(line.values)]
    if not lines:
        return None
    if len(group.runs) == 1:
        return replace(lines[0], label=group.label)
    label = f"{group.label} ({len(group.runs)} seeds)"
    if len(lines) == 1:
        return Series(label, lines[0].updates, lines[0].values)
    tables = [
        {u: v for u, v in zip(line.updates, line.values, strict=True) if math.isfinite(v)}
        for line in lines
    ]
    updates = sorted(set.intersection(*(set(table) for table in tables)))
    if not updates:
        return None
    values = np.array([[table[u] for u in updates] for table in tables], dtype=np.float64)
    return Series(label, np.array(updates), *mean_interval(values))


def table(groups: Sequence[Group]) -> str:
    """One line per group: its runs, its last evaluation with interval, and its best one.

    Values are those of :func:`series`. The best of several evaluations is biased upwards: use the
    last for comparisons.
    """
    lines: list[tuple[str, ...]] = [
        ("", "runs", "updates", "evaluated at", "return", "score", "best evaluation")
    ]
    for group in groups:
        shown = {name: series(group, name) for name in EVALUATED}
        evaluated = shown["score_mean"] or shown["return_mean"]
        first, last = min(r.updates for r in group.runs), max(r.updates for r in group.runs)
        cells = [
            group.label,
            str(len(group.runs)),
            f"{last:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}",
            "-" if evaluated is None else f"{evaluated.updates[-1]:,.0f}",
            *("-" if line is None else _last(line) for line in shown.values()),
            "-" if evaluated is None else _best(evaluated),
        ]
        lines.append(tuple(cells))
    if all(line[5] == "-" for line in lines[1:]):
        lines = [line[:5] + line[6:] for line in lines]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    above = widths[0] > WIDEST_LABEL  # a long label has its own line
    text = []
    for label, *cells in lines:
        if above and label:
            text.append(label)
        lead = " " * 4 if above else label.ljust(widths[0])
        text.append("  ".join([lead, *map(str.rjust, cells, widths[1:])]).rstrip())
    return "\n".join(text)


def _last(line: Series) -> str:
    value = line.values[-1]
    if line.low is None or line.high is None or not np.isfinite(line.low[-1] + line.high[-1]):
        return _numbers(value)[0]
    return "{} [{}, {}]".format(*_numbers(value, line.low[-1], line.high[-1]))


def _best(line: Series) -> str:
    if np.isnan(line.values).all():
        return "-"
    at = int(np.nanargmax(line.values))
    return f"{_numbers(line.values[at])[0]} at {line.updates[at]:,.0f}"


def _numbers(*values: float) -> list[str]:
    size = max(map(abs, values))
    places = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4
    return [f"{value:,.{places}f}" for value in values]
