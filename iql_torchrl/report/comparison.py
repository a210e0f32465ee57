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
    """Runs that differ only in their seed, under a label that says how they differ from others."""

    label: str
    runs: tuple[Run, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and tabulate runs; 0, or 2 after a sentence about what cannot be read or drawn."""
    options = _parser().parse_args(arguments)
    try:
        if options.output.suffix.lower() != ".png":
            raise ValueError(f"--output is {options.output}; wanted a name that ends in .png.")
        runs = [read_run(folder) for folder in find_runs(options.runs)]
        groups = group_runs(_begun(runs), each=options.each)
        metrics = _metrics(options.metrics, groups)
        panels = {name: [series(group, name) for group in groups] for name in metrics}
        drawn = {name: [s for s in found if s is not None] for name, found in panels.items()}
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
    """Draw one column of several runs, by label, to a PNG; ``reference`` is a level to compare with.

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
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or one that holds runs")
    add("--output", type=Path, default=Path("comparison.png"), metavar="FILE.png")
    add("--metrics", nargs="+", metavar="NAME", help=f"columns of {TABLE}, one panel each")
    add("--each", action="store_true", help="one line per run, seeds apart")
    return parser


def _begun(runs: Sequence[Run]) -> list[Run]:
    for run in runs:
        if not run.rows:
            print(f"note: {run.folder} has no rows yet and is left out.", file=sys.stderr)
    begun = [run for run in runs if run.rows]
    if not begun:
        raise ValueError("none of the runs has a row yet; wait for their first evaluation.")
    return begun


def _metrics(asked: Sequence[str] | None, groups: Sequence[Group]) -> list[str]:
    """The columns to draw: those asked for, or evaluations, losses and values that exist."""
    rows = [row for group in groups for run in group.runs for row in run.rows]
    present = {name for row in rows for name in row} - {"update"}
    if asked is None:
        scored = all(_column_exists(group, "score_mean") for group in groups)
        first = "score_mean" if scored else "return_mean"
        known = [name for name in (first, *OTHERS) if name in present]
        return known or sorted(present)
    for name in asked:
        if name not in present:
            near = difflib.get_close_matches(name, present, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--metrics: no run has a column {name!r}; {hint}There are: "
                f"{', '.join(sorted(present))}."
            )
    return list(dict.fromkeys(asked))


def _column_exists(group: Group, name: str) -> bool:
    return any(name in row for run in group.runs for row in run.rows)


def _note_gaps(groups: Sequence[Group], metrics: Iterable[str]) -> None:
    """Say on stderr what is missing from a group's lines and from its numbers in the table."""
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
    """Join runs that differ only in ``seed``, in order of appearance; ``each`` keeps all apart.

    Of runs with the same settings and the same seed, which are not two samples, only the one that
    went furthest (the last of equals) is kept, with a note on stderr. Runs without settings or
    without a seed stand alone. Settings that a file lacks have IQLConfig's defaults.
    """
    if each:
        return _labelled([[run] for run in runs], with_seed=True)
    gathered: dict[str, dict[str, Run]] = {}
    for run in runs:
        settings = _settings(run)
        seed = json.dumps(settings.pop("seed", None))
        apart = "seed" not in run.settings
        key = str(run.folder.resolve()) if apart else json.dumps(settings, sort_keys=True)
        same = gathered.setdefault(key, {})
        kept, dropped = run, same.get(seed)
        if dropped is not None:
            if kept.updates < dropped.updates:
                kept, dropped = dropped, kept
            print(
                f"note: {dropped.folder} is left out: {kept.folder} has its settings and its seed.",
                file=sys.stderr,
            )
        same[seed] = kept
    return _labelled([list(same.values()) for same in gathered.values()], with_seed=False)


def _settings(run: Run) -> dict[str, Any]:
    """The run's settings, ``dataset`` first, and defaults for fields that its version lacked."""
    missing = {k: v for k, v in IQLConfig().to_dict().items() if k not in run.settings}
    return run.settings | missing if run.settings else {}


def _labelled(groups: Sequence[Sequence[Run]], *, with_seed: bool) -> list[Group]:
    """Name what differs between the groups, and their folders where that does not tell them apart."""
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

    Values are :func:`series`'s. The best of several evaluations is a hopeful number: prefer the
    last.
    """
    lines: list[tuple[str, ...]] = [
        ("", "runs", "updates", "evaluated at", "return", "score", "best evaluation")
    ]
    for group in groups:
        shown = {name: series(group, name) for name in EVALUATED}
        judged = shown["score_mean"] or shown["return_mean"]
        first, last = min(r.updates for r in group.runs), max(r.updates for r in group.runs)
        cells = [
            group.label,
            str(len(group.runs)),
            f"{last:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}",
            "-" if judged is None else f"{judged.updates[-1]:,.0f}",
            *("-" if line is None else _last(line) for line in shown.values()),
            "-" if judged is None else _best(judged),
        ]
        lines.append(tuple(cells))
    if all(line[5] == "-" for line in lines[1:]):
        lines = [line[:5] + line[6:] for line in lines]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    above = widths[0] > WIDEST_LABEL  # a long label stands on its own line
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
