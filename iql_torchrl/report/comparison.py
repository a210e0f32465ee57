"""Compare runs: ``python -m iql_torchrl.report RUN... [--output FILE.png]``."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.report.aggregates import aggregate_table, method_scores
from iql_torchrl.report.figures import Series, comparison_figure, draw, save
from iql_torchrl.report.groups import Group, group_runs, series
from iql_torchrl.report.runs import TABLE, Run, find_runs, read_run

__all__ = ["draw", "main", "table"]

FloatArray = NDArray[np.float64]

EVALUATED = ("return_mean", "score_mean")
TRAINING_COLUMNS = ("success_rate", "loss_actor", "loss_qvalue", "loss_value", "value_mean")
WIDEST_LABEL = 48
NOTE = "Bands, 95 %: of several seeds over the seeds (Student's t), of one run over its episodes"


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


def _column_exists(group: Group, name: str) -> bool:
    return any(name in row for run in group.runs for row in run.rows)


def _note_gaps(groups: Sequence[Group], metrics: Iterable[str]) -> None:
    """Print to stderr which numbers are missing in a group's lines and in the table."""
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
