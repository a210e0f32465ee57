"""Checks of the next observations of a table against its rows and marks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.columns import Table
from iql_torchrl.data.readers.motion import ROWS, breaks
from iql_torchrl.data.readers.table_ends import MOST, Ends

__all__ = ["successor_warning"]

Flags = NDArray[np.bool_]
#: Columns that mark ends of trajectories other than terminations.
MARKS = ("truncated", "trajectory_end", "valid", "episode")


def successor_warning(table: Table, ends: Ends) -> str | None:
    """One sentence if ``next_observation`` contradicts the rows or marks, otherwise None.

    A row *breaks* where its ``next_observation`` is not the following row's observation (see
    ``motion.breaks``). Rows inside an episode must not break, and a truncated row must, because the
    following row begins another episode. A terminated row may do either: some files contain the
    following row's observation there, and its value is never used.
    """
    if ends.broken is None or not len(ends.broken):
        return None
    marked = any(key in table.columns for key in MARKS)
    # Without such marks episodes were cut where rows break.
    inside = ends.valid[:-1] & ~(ends.last if marked else ends.terminated)[:-1]
    count, total = int((ends.broken & inside).sum()), int(inside.sum())
    if 2 * count > total:
        return _unrelated(table, inside, count, total)
    if count and marked:
        return _breaks_inside(table, ends, inside, count)
    return _unbroken(table, ends)


def _unrelated(table: Table, inside: Flags, count: int, total: int) -> str:
    """Most rows break: the sentence says what the next observations seem to be."""
    path = table.paths["next_observation"]
    reason = (
        "the next observations may be shifted, in another scale, or of other rows, or the rows are "
        "not in the order of time"
    )
    looked_at = inside[:ROWS]
    for ahead, meaning in (
        (0, "the same row's observation: they are copies, or shifted by one row to the end"),
        (2, "the observation two rows later: they are shifted by one row to the beginning"),
    ):
        differs = breaks(table, len(looked_at), ahead)
        rows = looked_at[: len(differs)]
        equal = int((~differs & rows).sum())
        if 2 * equal > rows.sum():
            reason = f"{equal} of {int(rows.sum())} rows looked at contain {meaning}"
    return (
        f"next_observation ({path!r}) is not the following row's observation in {count} of {total} "
        f"rows inside episodes: {reason}. Repair the column, or pass columns={{'next_observation': "
        "None} to use the following rows. If the rows are shuffled transitions, each one is used as "
        "it stands, but lengths and returns of episodes have no meaning."
    )


def _breaks_inside(table: Table, ends: Ends, inside: Flags, count: int) -> str:
    """Some rows inside episodes break: marks are missing or shifted."""
    assert ends.broken is not None
    broken = ends.broken & inside
    first, path = int(broken.argmax()), table.paths["next_observation"]
    reason = _shifted(table, ends, broken)
    if reason is None:
        reason = (
            "marks of ends are missing there"
            if count > 1
            else "a mark of an end is missing there, or it is where a ring buffer overwrote its "
            "oldest rows (begin the table with the row after it)"
        )
    return (
        f"next_observation ({path!r}) is not the following row's observation in {count} rows inside "
        f"episodes, first at row {first}: {reason}. Mark those rows as truncated or terminated; "
        "where no termination is missing, columns={'truncated': None} ends episodes at such rows."
    )


def _shifted(table: Table, ends: Ends, broken: Flags) -> str | None:
    """Whether the breaks lie one row before or after the marks."""
    marks = (ends.last | ends.terminated)[:-1] & ~(ends.broken if ends.broken is not None else True)
    for shift, place in ((1, "before"), (-1, "after")):
        shifted = np.roll(marks, shift)
        if int((shifted & broken).sum()) >= MOST * int(broken.sum()):
            return f"the marks of ends are shifted: each lies one row {place} such a row"
    return None


def _unbroken(table: Table, ends: Ends) -> str | None:
    """A warning if at nearly all marked ends the following row continues the episode.

    Single ones may be correct, in logs from which parts were removed.
    """
    assert ends.broken is not None
    keys = [key for key in ("truncated", "trajectory_end", "episode") if key in table.columns]
    if not keys or "valid" in table.columns:
        return None
    rows = (ends.last & ends.truncated & ~ends.terminated)[:-1]
    total, count = int(rows.sum()), int((rows & ~ends.broken).sum())
    if total < 3 or count < 0.9 * total or not _moves(table):
        return None
    names = ", ".join(repr(table.paths[key]) for key in keys)
    return (
        f"{count} of the {total} ends that {names} marks as truncated are followed by the row that "
        "their next_observation holds: those episodes continue there, and the marks may be shifted, or "
        "next_observation holds the next episode's first observation, from which a wrong value is "
        "bootstrapped. If recording was cut there on purpose, ignore this warning."
    )


def _moves(table: Table) -> bool:
    """Whether successive observations usually differ, so that equal ones have a cause."""
    steps = min(table.rows, ROWS) - 1
    changed = np.zeros(steps, np.bool_)
    for column in table.observation.values():
        values = np.asarray(column[: steps + 1]).reshape(steps + 1, -1)
        changed |= (values[1:] != values[:-1]).any(axis=1)
    return bool(2 * changed.sum() > steps)
