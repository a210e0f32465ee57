"""The order of rows: ids that recur, environments that take turns, and gaps of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns, text_seconds
from iql_torchrl.data.readers.columns import IDS
from iql_torchrl.data.readers.hints import leading_values
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.tolerance import EQUAL

#: A gap ends an episode if it is longer than so many usual steps: where most steps of time are equal
#: (within 1 %), and where they are not.
REGULAR_GAP, IRREGULAR_GAP = 1.5, 20.0


def sorted_rows(columns: Columns) -> tuple[Columns, list[str]]:
    """The columns with the rows of each id together, in the order of the source; and notes.

    Rows are sorted, stably, by ``env_index`` and ``episode`` where an id occurs again after another,
    unless their numbers begin again there, as in joined recordings (:func:`_numbers_begin_again`).
    """
    notes: list[str] = []
    for key in ("env_index", "episode"):
        if key not in columns.columns:
            continue
        codes = id_codes(columns, key)
        ends = np.append(codes[1:] != codes[:-1], True)
        if ends.sum() == codes.max() + 1:
            continue
        path, blocks, count = columns.paths[key], int(ends.sum()), int(codes.max()) + 1
        if key == "episode" and _numbers_begin_again(columns, codes, ends):
            notes.append(
                f"{path!r} has {count} ids in {blocks} blocks of rows, which do not continue each "
                "other: every block is an episode."
            )
            continue
        columns = columns.sorted_by(np.argsort(codes, kind="stable"))
        notes.append(
            f"rows are sorted by {path!r}, whose {count} ids take turns in {blocks} blocks of rows; "
            "the order inside an id is that of the source."
        )
    return columns, notes


def id_codes(columns: Columns, key: str) -> NDArray[np.int64]:
    """A number for each row's id, ``(rows,)``, from 0 in the order of the first occurrence."""
    values = np.asarray(columns.columns[key][:]).reshape(-1)
    if values.dtype.kind == "f" and (unknown := np.flatnonzero(~np.isfinite(values))).size:
        raise DatasetError(
            f"{columns.name}: {key} ({columns.paths[key]!r}) is NaN or infinite in {len(unknown)} of "
            f"{len(values)} rows, first at row {columns.source_row(unknown[0])}; expected one id per "
            f"{'episode' if key == 'episode' else 'environment'} in every row."
        )
    if values.dtype.kind == "O":
        values = values.astype(str)
    # blocks of equal ids are few: numbers them, not the rows
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    _, first, inverse = np.unique(values[starts], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.repeat(rank[inverse], np.diff(np.append(starts, len(values))))


def episode_ends(columns: Columns, keys: Sequence[str] = IDS) -> NDArray[np.bool_] | None:
    """The last row of each block of equal ids, ``(rows,)``; None without ids."""
    given = [id_codes(columns, key) for key in keys if key in columns.columns]
    if not given:
        return None
    changes = np.any([codes[1:] != codes[:-1] for codes in given], axis=0)
    return np.append(changes, True)


def _numbers_begin_again(
    columns: Columns, codes: NDArray[np.int64], ends: NDArray[np.bool_]
) -> bool:
    """Ids occur again because their numbers begin again, not because they take turns.

    Decided for the blocks of rows whose id occurs again, by the first that is known: done flags at all
    of their ends; next observations, of which the most are not those of the id's next row; blocks of
    one row, which take turns; the median distance to the id's next row, which is above 90 % of the
    steps inside blocks.
    """
    done = np.zeros(len(codes), np.bool_)
    for key in ("terminated", "truncated", "trajectory_end", "not_terminated"):
        if key in columns.columns:
            done |= np.ravel(columns.columns[key][:]) == (key != "not_terminated")
    order = np.argsort(codes, kind="stable")
    same = codes[order[1:]] == codes[order[:-1]]
    again = same & ends[order[:-1]]
    rows, successors = order[:-1][again], order[1:][again]
    if done[rows].all():
        return True
    if following := columns.leaves("next/observation"):
        pairs = columns.leaves("observation"), following
        sides = [np.hstack([_flat(side[key]) for key in pairs[0]]) for side in pairs]
        return bool(np.median(np.abs(sides[1][rows] - sides[0][successors]).max(axis=1)) > EQUAL)
    if len(codes) < 2 * int(ends.sum()):
        return False
    values = leading_values(columns.leaves("observation"))
    spread = values.std(axis=0)
    values = values[:, spread > 0] / spread[spread > 0]
    looked_at = successors < len(values)
    inside = np.flatnonzero(~ends[: len(values) - 1])
    if not values.shape[1] or not looked_at.any() or not len(inside):
        return True
    step = np.abs(values[inside + 1] - values[inside]).mean(axis=1)
    jump = np.abs(values[successors[looked_at]] - values[rows[looked_at]]).mean(axis=1)
    return bool(np.median(jump) > np.quantile(step, 0.9))


def _flat(column: Column) -> NDArray[np.float64]:
    values = np.asarray(column[:], np.float64)
    return values.reshape(len(values), -1)


def time_gaps(
    columns: Columns, flags: Mapping[str, NDArray[np.bool_]]
) -> tuple[NDArray[np.bool_] | None, list[str]]:
    """Rows after which ``time`` has a gap or goes back, ``(rows,)``; None without ``time``; and notes.

    Inside episodes, a gap is a step of more than 1.5 usual (median) ones where most steps are equal,
    and of more than 20 where they are not.
    """
    if "time" not in columns.columns:
        return None, []
    path, rows = columns.paths["time"], columns.rows
    raw = np.asarray(columns.columns["time"][:]).reshape(-1)
    if raw.dtype.kind in "UO":
        seconds = text_seconds(raw.tolist())
        if seconds is None:
            raise DatasetError(
                f"{columns.name}: time ({path!r}) has text that is not a date of ISO 8601, such as "
                f"{raw[0]!s}; convert it to numbers, or pass columns={{'time': None}}."
            )
        raw = seconds
    if raw.dtype.kind in "mM":
        raw = (raw - raw[0]) / np.timedelta64(1, "s")
    times = raw.astype(np.float64)
    if (unknown := np.flatnonzero(~np.isfinite(times))).size:
        raise DatasetError(
            f"{columns.name}: time ({path!r}) is missing in {len(unknown)} of {rows} rows, first at "
            f"row {columns.source_row(unknown[0])}; expected a time in every row, or columns={{'time': "
            f"None}}."
        )
    inside = ~(flags["terminated"] | flags["truncated"] | flags["trajectory_end"])[:-1]
    if (ids := episode_ends(columns)) is not None:
        inside &= ~ids[:-1]
    step = np.diff(times)
    usual = step[inside & (step > 0)]
    gaps = np.zeros(rows, np.bool_)
    if not usual.size:
        return gaps, []
    middle = float(np.median(usual))
    regular = (np.abs(usual - middle) <= 0.01 * middle).mean() >= 0.5
    limit = (REGULAR_GAP if regular else IRREGULAR_GAP) * middle
    back, gap = inside & (step < 0), inside & (step > limit)
    gaps[:-1] = back | gap
    notes: list[str] = []
    for where, text in (
        (gap, f"has gaps of more than {limit:g} (a usual step is {middle:g})"),
        (back, "goes back"),
    ):
        if where.any():
            notes.append(
                f"time ({path!r}) {text} after {int(where.sum())} rows inside episodes, first after "
                f"row {columns.source_row(int(where.argmax()))}: episodes are truncated there. "
                "columns={'time': None} ignores the column."
            )
    return gaps, notes
