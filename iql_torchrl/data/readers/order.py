"""The order of rows: ids that recur, environments that take turns, and gaps of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns, text_seconds
from iql_torchrl.data.readers.following import side_by_side
from iql_torchrl.data.readers.hints import leading_values
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.tolerance import EQUAL

Flags = NDArray[np.bool_]
#: A gap ends an episode if it is longer than so many usual steps: where most steps of time are equal
#: (within 1 %), and where they are not.
REGULAR_GAP, IRREGULAR_GAP = 1.5, 20.0


def sorted_rows(columns: Columns) -> tuple[Columns, dict[str, Flags], list[str]]:
    """The columns with the rows of each id together, in the order of the source; and notes.

    Rows are sorted, stably, by ``env_index`` and ``episode`` where an id occurs again after another,
    unless their numbers begin again there, as in joined recordings (:func:`_numbers_begin_again`).
    Second: by these keys, True at the last row of each block of equal ids.
    """
    notes: list[str] = []
    keys = [key for key in ("env_index", "episode") if key in columns.columns]
    ids: dict[str, NDArray[Any]] = {key: _id_codes(columns, key) for key in keys}
    for key in keys:
        codes, path = ids[key], columns.paths[key]
        ends = np.append(codes[1:] != codes[:-1], True)
        blocks, count = int(ends.sum()), int(codes.max()) + 1
        if blocks == count:
            continue
        if key == "episode" and _numbers_begin_again(columns, codes, ends):
            notes.append(
                f"{path!r} has {count} ids in {blocks} blocks of rows, which do not continue each "
                "other: every block is an episode."
            )
            continue
        order = np.argsort(codes, kind="stable")
        sources = order if columns.order is None else columns.order[order]
        sorted_: dict[str, Column] = {
            name: np.asarray(each[:])[order] for name, each in columns.columns.items()
        }
        columns = replace(columns, columns=sorted_, order=sources)
        ids = {each: values[order] for each, values in ids.items()}
        notes.append(
            f"rows are sorted by {path!r}, whose {count} ids take turns in {blocks} blocks of rows; "
            "the order inside an id is that of the source."
        )
    return columns, {k: np.append(v[1:] != v[:-1], True) for k, v in ids.items()}, notes


def _id_codes(columns: Columns, key: str) -> NDArray[np.int64]:
    """A number for each row's id, ``(rows,)``, from 0 in the order of the first occurrence."""
    values = np.asarray(columns.columns[key][:]).reshape(-1)
    if values.dtype.kind == "f" and (unknown := np.flatnonzero(~np.isfinite(values))).size:
        raise DatasetError(
            f"{columns.name}: {key} ({columns.paths[key]!r}) is NaN or infinite in {len(unknown)} of "
            f"{len(values)} rows, first at row {unknown[0]}; expected one id per "
            f"{'episode' if key == 'episode' else 'environment'} in every row."
        )
    if values.dtype.kind == "O":
        values = values.astype(str)
    # blocks of equal ids are few: numbers them, not the rows
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    _, first, inverse = np.unique(values[starts], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.repeat(rank[inverse], np.diff(np.append(starts, len(values))))


def _numbers_begin_again(columns: Columns, codes: NDArray[np.int64], ends: Flags) -> bool:
    """Ids occur again because their numbers begin again, not because they take turns.

    Decided for the blocks of rows whose id occurs again, by the first that is known: done flags at all
    of their ends; next observations, of which the most are not those of the id's next row; blocks of
    one row, which take turns; the median distance to the id's next row, which is above 90 % of the
    steps inside blocks.
    """
    done = np.zeros(len(codes), np.bool_)
    for key in {"terminated", "truncated", "trajectory_end"} & columns.columns.keys():
        done |= np.ravel(columns.columns[key][:]) == 1
    if "not_terminated" in columns.columns:
        done |= np.ravel(columns.columns["not_terminated"][:]) == 0
    order = np.argsort(codes, kind="stable")
    again = (codes[order[1:]] == codes[order[:-1]]) & ends[order[:-1]]
    rows, successors = order[:-1][again], order[1:][again]
    if done[rows].all():
        return True
    if following := columns.leaves("next/observation"):
        observed = columns.leaves("observation")
        here = side_by_side(observed, len(codes))
        after = side_by_side({key: following[key] for key in observed}, len(codes))
        return bool(np.median(np.abs(after[rows] - here[successors]).max(axis=1)) > EQUAL)
    if len(codes) < 2 * int(ends.sum()):
        return False
    values = leading_values(columns.leaves("observation"))
    spread = values.std(axis=0)
    values = values[:, spread > 0] / spread[spread > 0]
    known = successors < len(values)
    inside = np.flatnonzero(~ends[: len(values) - 1])
    if not values.shape[1] or not known.any() or not len(inside):
        return True
    step = np.abs(values[inside + 1] - values[inside]).mean(axis=1)
    jump = np.abs(values[successors[known]] - values[rows[known]]).mean(axis=1)
    return bool(np.median(jump) > np.quantile(step, 0.9))


def time_gaps(columns: Columns, inside: Flags) -> tuple[Flags, list[str]]:
    """Rows after which ``time`` has a gap or goes back inside episodes, ``(rows,)``; and notes.

    A gap is a step of more than 1.5 usual (median) ones where most steps are equal, and of more than
    20 where they are not. ``inside``: rows that do not end an episode.
    """
    subject = f"time ({columns.paths['time']!r})"
    raw: Any = np.asarray(columns.columns["time"][:]).reshape(-1)
    if raw.dtype.kind in "UO":
        text, raw = raw[0], text_seconds(raw.tolist())
        if raw is None:
            raise DatasetError(
                f"{columns.name}: {subject} has text that is not a date of ISO 8601, such as "
                f"{text!s}; convert it to numbers, or pass columns={{'time': None}}."
            )
    if raw.dtype.kind in "mM":
        raw = (raw - raw[0]) / np.timedelta64(1, "s")
    times = raw.astype(np.float64)
    if (unknown := np.flatnonzero(~np.isfinite(times))).size:
        raise DatasetError(
            f"{columns.name}: {subject} is missing in {len(unknown)} of {len(times)} rows, first at "
            f"row {columns.source_row(unknown[0])}; expected a time in every row, or columns={{'time': "
            f"None}}."
        )
    step, inside, notes = np.append(np.diff(times), 0), inside.copy(), list[str]()
    inside[-1] = False
    if not (usual := step[inside & (step > 0)]).size:
        return np.zeros_like(inside), []
    middle = float(np.median(usual))
    regular = (np.abs(usual - middle) <= 0.01 * middle).mean() >= 0.5
    limit = (REGULAR_GAP if regular else IRREGULAR_GAP) * middle
    gap, back = inside & (step > limit), inside & (step < 0)
    gap_text = f"has gaps of more than {limit:g} (a usual step is {middle:g})"
    for where, text in ((gap, gap_text), (back, "goes back")):
        if where.any():
            notes.append(
                f"{subject} {text} after {int(where.sum())} rows inside episodes, first after "
                f"row {columns.source_row(int(where.argmax()))}: episodes are truncated there. "
                "columns={'time': None} ignores the column."
            )
    return gap | back, notes
