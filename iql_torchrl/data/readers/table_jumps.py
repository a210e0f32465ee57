"""Tables without next observations: whether rows inside episodes jump as ends of episodes do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.columns import Table
from iql_torchrl.data.readers.motion import looked_at, motion
from iql_torchrl.data.readers.table_ends import Ends

__all__ = ["jump_warning", "unused_marks"]

Flags = NDArray[np.bool_]
#: Smallest number of jumps inside episodes that is reported.
FEWEST = 3
#: Names of columns that often mark ends, in files that have no column of our names for them.
POSSIBLE_MARKS = (
    "episode_terminals", "dones", "done", "next/done", "dones_float", "terminals", "timeouts",
    "timeout", "is_last", "episode_ends",
)  # fmt: skip


def jump_warning(table: Table, ends: Ends) -> str | None:
    """Jumps of the observation inside episodes, where the following row is taken as successor.

    Motion that is not smooth, such as a collision, jumps too (see ``motion.Motion.jumps``). So
    fewer than ``FEWEST`` jumps are not reported, and more only in one of two cases: more rows jump
    inside episodes than at their ends, and less than half of the ends jump; or more than half of
    the jumps inside episodes lead to an observation like the first ones of episodes (see
    ``_start_like``).
    """
    if table.next_observation is not None or not ends.valid.all():
        return None
    if (moved := motion(table)) is None:
        return None
    at_end = ends.last[: len(moved.jumps)]
    inside = moved.jumps & ~at_end
    count, matching = int(inside.sum()), int((moved.jumps & at_end).sum())
    if count < FEWEST:
        return None
    misplaced = 2 * matching < at_end.sum() and count > matching
    if not misplaced and not _restarts(table, at_end, inside):
        return None
    marks = [repr(table.paths[k]) for k in ("truncated", "episode") if k in table.columns]
    cause = (
        f"the marks {', '.join(marks)} may be shifted or incomplete"
        if marks
        else "max_episode_steps (by default the environment's limit) may not be the one that the "
        "data was recorded with"
    )
    return (
        f"in {count} rows inside episodes{looked_at(table)}, first row {int(inside.argmax())}, the "
        f"observation jumps to the following row's, while {matching} of {int(at_end.sum())} ends of "
        f"episodes jump: {cause}. Then some successors are wrong.{unused_marks(table)}"
    )


def unused_marks(table: Table) -> str:
    """A sentence that names unused columns that look like marks of ends."""
    names = []
    for name in POSSIBLE_MARKS:
        column = table.unused.get(name)
        if column is None or int(np.prod(column.shape)) != table.rows:
            continue
        values = np.asarray(column[:]).reshape(-1)
        if values.dtype.kind not in "biuf" or not ((values == 0) | (values == 1)).all():
            continue
        if 0 < values.mean() < 0.5:
            names.append(name)
    if not names:
        return ""
    return (
        f" The unused column {names[0]!r} looks like marks of ends: columns={{'truncated': "
        f"{names[0]!r}}} reads it."
    )


def _restarts(table: Table, at_end: Flags, jumps: Flags) -> bool:
    """Whether most of the jumps lead to observations like those that episodes begin with."""
    similar = _start_like(table, at_end)
    if similar is None:
        return False
    ordinary = similar[~at_end & ~jumps].mean()
    return bool(similar[jumps].mean() > 0.5 and ordinary < 0.3)


def _start_like(table: Table, at_end: Flags) -> Flags | None:
    """Per step, whether the row it leads to is like the first rows of episodes.

    That is: at least 3 of 4 columns lie within the range of those first rows. Where
    there are no more than ``FEWEST`` of them, the range is widened by a quarter of the column's
    standard deviation. None without float columns.
    """
    steps = len(at_end)
    parts = [
        np.asarray(column[: steps + 1], np.float64).reshape(steps + 1, -1)
        for column in table.observation.values()
        if np.dtype(column.dtype).kind == "f"
    ]
    if not parts:
        return None
    values = np.concatenate(parts, axis=1)
    reached, starts = values[1:], values[np.concatenate([[True], at_end])]
    slack = 0.25 * values.std(axis=0) if len(starts) <= FEWEST else 0.0
    within = (reached >= starts.min(axis=0) - slack) & (reached <= starts.max(axis=0) + slack)
    similar: Flags = within.mean(axis=1) >= 0.75
    return similar
