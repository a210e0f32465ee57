"""Where a table's rows terminate, where its trajectories end, and which rows are transitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.columns import Table
from iql_torchrl.data.readers.motion import Motion, breaks, motion
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.schema import DatasetError

__all__ = ["Ends", "continued_rows", "table_ends"]

Flags = NDArray[np.bool_]
#: Share of the marked rows that must lie inside continued motion to be reported as misplaced.
MOST = 0.9


@dataclass(frozen=True)
class Ends:
    """Marks of a table's rows, each ``(rows,)``.

    Attributes:
        terminated: the row terminates: the value of its successor is 0.
        truncated: the row is the last of its trajectory for another reason.
        last: the last row of each trajectory, including rows that are not transitions.
        valid: False at rows that are not transitions and only contain the last next observation.
        broken: the row's ``next_observation`` is not the following row's observation, ``(rows -
            1,)``; None without ``next_observation``.
    """

    terminated: Flags
    truncated: Flags
    last: Flags
    valid: Flags
    broken: Flags | None


def table_ends(table: Table, options: ReadOptions) -> Ends:
    """Reads the marks; see ``table_source`` for the rules."""
    terminated, truncated = table.terminated(), table.flags("truncated")
    end, valid = table.flags("trajectory_end"), table.flags("valid")
    broken = None if table.next_observation is None else breaks(table)
    # A termination ends its trajectory, unless another column says where trajectories end.
    may_go_on = "not_terminated" in table.columns
    marked = np.zeros(table.rows, np.bool_)
    for flags in (truncated, end):
        if flags is not None:
            marked |= flags
    only_terminations = end is None or np.array_equal(end, terminated)
    if may_go_on and only_terminations and valid is None:
        may_go_on = broken is not None and end is None
        if may_go_on and broken is not None:
            marked[:-1] |= terminated[:-1] & broken
    last = marked if may_go_on else marked | terminated
    if valid is not None:
        next_valid = np.concatenate([valid[1:], [True]])
        last = (last & valid & next_valid) | ~valid
    last[-1] = True
    unmarked = truncated is None and valid is None and only_terminations
    if "episode" in table.columns:
        last = _numbered(table, terminated, last, valid, broken)
    elif unmarked and broken is not None:
        last[:-1] |= broken
    elif unmarked and end is None:
        _check_known(table, options)
    if unmarked and options.max_episode_steps:
        last = _cut_long(last, options.max_episode_steps)
    if truncated is None or end is not None or valid is not None:
        truncated = last & ~terminated
    elif "not_terminated" in table.columns:
        truncated = truncated & ~terminated
    used = np.ones(table.rows, np.bool_) if valid is None else valid
    return Ends(terminated, truncated, last, used, broken)


def _numbered(
    table: Table, terminated: Flags, last: Flags, valid: Flags | None, broken: Flags | None
) -> Flags:
    """Ends of trajectories where the column ``episode`` numbers them."""
    ids = np.asarray(table.columns["episode"][:]).reshape(-1)
    if ids.dtype.kind == "f" and (wrong := np.flatnonzero(~np.isfinite(ids))).size:
        raise DatasetError(
            f"{table.name}: {table.named('episode')} is NaN or infinite in {len(wrong)} of "
            f"{table.rows} rows, first at row {wrong[0]}; expected one number per episode."
        )
    changes = np.concatenate([ids[1:] != ids[:-1], [True]])
    wrong = last & ~changes
    if valid is not None:
        wrong &= valid
    goals = wrong & terminated
    if goals.any() and np.array_equal(goals, wrong) and _successive(table, goals, changes, broken):
        wrong = wrong & ~goals
        last = last & ~goals
    if wrong.any():
        raise DatasetError(
            f"{table.name}: {int(wrong.sum())} rows are marked as ends although the episode number "
            f"continues, first at row {int(wrong.argmax())}; expected marks and numbers to agree. A "
            "termination within an episode is read as such only where the next row evidently "
            "continues the motion."
        )
    return last | changes


def _successive(table: Table, rows: Flags, last: Flags, broken: Flags | None) -> bool:
    """Whether each of the rows is evidently followed by its own successor."""
    if broken is not None:
        return not (broken & rows[:-1]).any()
    return bool(continued_rows(motion(table), rows, ~rows & ~last, None))


def continued_rows(moved: Motion | None, rows: Flags, ordinary: Flags, broken: Flags | None) -> int:
    """How many of the marked rows are evidently followed by their own trajectory's next row.

    That is: the step to the next row is as well predicted as 99 % of the steps from ``ordinary``
    rows (``Motion.inside``), and where ``next_observation`` is known it equals the next row's
    observation (``broken``, see ``Ends``). 0 unless this is true for the share ``MOST`` of the
    marked rows that ``moved`` covers. If next observations are merely the observations shifted by
    one row, also at the ends of episodes, the second condition is true but not the first.
    """
    if moved is None:
        return 0
    marked = rows[: len(moved.error)].copy()
    total = int(marked.sum())
    if broken is not None:
        marked &= ~broken[: len(marked)]
    smooth = moved.inside(marked, ordinary[: len(marked)])
    return smooth if smooth is not None and smooth >= MOST * total else 0


def _check_known(table: Table, options: ReadOptions) -> None:
    if not options.max_episode_steps and not table.truncation_ignored:
        raise DatasetError(
            f"{table.name}: neither truncated, episode nor next_observation shows where episodes "
            "end besides termination; pass max_episode_steps or env, name one with columns={...}, "
            "or columns={'truncated': None} if every episode terminates."
        )


def _cut_long(ends: Flags, steps: int) -> Flags:
    last = np.flatnonzero(ends)
    first = np.concatenate([[0], last[:-1] + 1])
    row = np.arange(len(ends))
    age = row - np.repeat(first, last - first + 1)
    cut: Flags = ends | ((age + 1) % steps == 0)
    return cut
