"""Whether a table's rows contradict its marks, and what to say about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iql_torchrl.data.readers.arrays import UnreadableColumn
from iql_torchrl.data.readers.columns import TRAJECTORY_ENDS, Flags, Table
from iql_torchrl.data.readers.motion import ROWS, differs, float_values

#: Share of marked rows above which a statement about them is made.
MOST = 0.9
#: Columns that mark ends of trajectories other than terminations.
MARKS = ("truncated", "trajectory_end", "valid", "episode")
#: Smallest number of jumps inside episodes that is reported.
FEWEST = 3
#: In tables of up to so many rows, or episodes, nothing is said about what most of them are.
MANY = 20
#: Names of columns that often mark ends, in files that have no column of our names for them.
POSSIBLE_MARKS = (
    "episode_terminals", "dones", "done", "next/done", "dones_float", "terminals", "timeouts",
    "timeout", "is_last", "episode_ends",
)  # fmt: skip


@dataclass(frozen=True)
class Ends:
    """Marks of a table's rows, each ``(rows,)``.

    Attributes:
        terminated: the row terminates: the value of its successor is 0.
        truncated: the row is the last of its trajectory for another reason.
        last: the last row of each trajectory, including rows that are not transitions.
    """

    terminated: Flags
    truncated: Flags
    last: Flags


def continued_rows(table: Table, rows: Flags, ordinary: Flags) -> int:
    """How many of the marked ``rows`` are evidently followed by their own trajectory's next row.

    That is: the step to the next row is as well predicted as 99 % of the steps from ``ordinary``
    rows that do not jump, and where ``next_observation`` is known it equals the next row's
    observation (where it is merely that row's, also at ends, the second is true but not the first).
    0 unless this is true for the share ``MOST`` of the marked rows that the motion covers, and if the
    errors of unrelated and of successive rows do not differ.
    """
    if not rows[:-1].any() or (moved := table.motion) is None:
        return 0
    steps = len(moved.error)
    marked, ordinary = rows[:steps], ordinary[:steps] & ~moved.jumps
    if not marked.any() or not ordinary.any():
        return 0
    limit = float(np.quantile(moved.error[ordinary], 0.99))
    smooth = marked & (moved.error <= limit)
    if table.broken is not None:
        smooth &= ~table.broken[:steps]
    count = int(smooth.sum())
    return count if moved.unrelated > limit and count >= MOST * int(marked.sum()) else 0


def contradictions(table: Table, ends: Ends, inside: int) -> list[str]:
    """Sentences about marks that the rows contradict; successors count where the marks agree."""
    texts = [
        _no_terminations(table) or _opposite(table, ends, inside),
        _continued(table, ends, "terminated"),
    ]
    if table.broken is None:
        texts.append(_continued(table, ends, "truncated"))
    if not any(texts):
        texts.append(_breaks_inside(table, ends) or _continued(table, ends, "truncated"))
    return [text for text in texts if text]


def _no_terminations(table: Table) -> str:
    """Ends are marked, but no column marks which of them terminate."""
    path = table.paths.get("trajectory_end")
    if path is None or {"terminated", "not_terminated"} & set(table.paths):
        return ""
    return (
        f"no column marks which rows terminate: together with {table.paths['valid']!r}, {path!r} "
        "marks ends of trajectories, and all of them were read as truncated. Add 'masks' (0 where a "
        f"row terminates), or pass columns={{'terminated': None, 'truncated': {path!r}}} if none does."
    )


def _opposite(table: Table, ends: Ends, inside: int) -> str:
    """Nearly all rows terminate, although their trajectories continue.

    In logs of bandits the following row is not the successor, and there is no warning.
    """
    if "not_terminated" in table.paths:
        key, opposite = "not_terminated", "terminated"
        share = inside / max(1, int((table.flags["valid"] & ~ends.last).sum()))
        evident = share > MOST
    else:
        key, opposite, share = "terminated", "not_terminated", float(ends.terminated.mean())
        broken = table.broken is not None and 2 * int(table.broken.sum()) > len(table.broken)
        moved = table.motion if share > MOST and table.rows > MANY and not broken else None
        evident = moved is not None and float(np.quantile(moved.error, 0.9)) < moved.unrelated
    if not evident:
        return ""
    path = table.paths[key]
    return (
        f"{path!r} says that {share:.0%} of the rows terminate, although their trajectories continue: "
        f"it may mean the opposite. columns={{{opposite!r}: {path!r}}} reads it in this way."
    )


def _continued(table: Table, ends: Ends, key: str) -> str:
    """Most rows that are marked as ends are evidently followed by their trajectory's next row.

    See ``continued_rows``; where ``next_observation`` is known, truncated rows whose next observation
    is the following row's count. Single ones may be correct, in logs from which parts were removed.
    """
    broken = table.broken if key == "truncated" else None
    names = (key,) if broken is None else MARKS
    paths = [table.paths[name] for name in names if name in table.paths]
    if not paths or not table.flags["valid"].all():
        return ""
    if "episode" in table.paths and broken is None:
        return ""
    if key == "terminated" and "not_terminated" in table.paths:
        return ""
    rows = ends.last & (
        ends.terminated if key == "terminated" else ends.truncated & ~ends.terminated
    )
    if broken is None:
        count = continued_rows(table, rows, ~ends.last)
        rows = rows[: min(table.rows, ROWS) - 1]
    else:
        rows = rows[:-1]
        count = int((rows & ~broken).sum())
        if rows.sum() < FEWEST or count < MOST * rows.sum():
            return ""
        if differs(table.observation, table.observation, ROWS).mean() <= 0.5:  # they hardly move
            return ""
    if not count:
        return ""
    path = ", ".join(map(repr, paths))
    text = (
        f"{count} of the {int(rows.sum())} rows marked {key} ({path}) are followed by a row that "
        "continues the same trajectory, yet each was read as the end of an episode. "
    )
    if key == "truncated":
        return text + (
            "The marks may be shifted or misplaced (columns={'truncated': None} ignores them), or "
            "next_observation belongs to the next episode, and a wrong value is bootstrapped. If "
            "recording was cut there on purpose, ignore this warning."
        )
    return text + (
        f"If {path} only marks where recording was cut, pass columns={{'terminated': None, "
        f"'truncated': {path}}}; if it is 0 where a row terminates, columns={{'not_terminated': "
        f"{path}}}; if trajectories do continue after a termination, number them in a column and "
        "name it with columns={'episode': ...}."
    )


def _breaks_inside(table: Table, ends: Ends) -> str:
    """Rows inside episodes are not followed by their successor.

    A row breaks where its ``next_observation`` is not the following row's observation, unless it
    terminates; without ``next_observation`` where the observation jumps. Motion that is not smooth,
    such as a collision, jumps too: so jumps are reported only from ``FEWEST`` on, and if more rows jump
    inside episodes than at their ends, of which less than half jump, or if most of them lead to an
    observation like the first ones of episodes. In a table without any mark all are reported.
    """
    marked, known = any(key in table.paths for key in MARKS), table.broken is not None
    valid, broken = table.flags["valid"], table.broken
    if broken is None and valid.all() and table.motion is not None:
        broken = table.motion.jumps
    if broken is None:
        return ""
    at_end = ends.last[: len(broken)]
    # Without marks, episodes were cut where rows break.
    inside = valid[: len(broken)] & ~(at_end if marked or not known else ends.terminated[:-1])
    breaks = broken & inside
    count, matching = int(breaks.sum()), int((broken & at_end).sum())
    if known and 2 * count > inside.sum():
        return _unrelated(table, inside, count)
    without_ends = (
        not (ends.last[:-1] | ends.terminated[:-1]).any() and "episode" not in table.paths
    )
    if not known and not without_ends:
        misplaced = 2 * matching < at_end.sum() and count > matching
        if count < FEWEST or not (misplaced or _restarts(table, at_end, breaks)):
            return ""
    if not count or (known and not marked):
        return ""
    looked_at = f" among the first {ROWS:,} rows" if table.rows > ROWS and not known else ""
    what = "the observation jumps to the following row's"
    if known:
        path = table.paths["next_observation"]
        what = f"next_observation ({path!r}) is not the following row's observation"
    if without_ends:
        reason = (
            "no row is marked terminated or truncated, and the whole table was read as one episode. "
            "Pass columns={'truncated': None} with max_episode_steps=, or name the column that marks "
            f"ends of trajectories (such as {', '.join(map(repr, TRAJECTORY_ENDS))}) with "
            "columns={'truncated': ...} or numbers them with columns={'episode': ...}"
        )
    elif not marked:
        reason = (
            "max_episode_steps (by default the environment's limit) may not be the one that the data "
            "was recorded with"
        )
    else:
        reason = _missing_or_shifted((at_end | ends.terminated[: len(broken)]) & ~broken, breaks)
    return (
        f"{what} in {count} rows inside episodes{looked_at}, first at row {int(breaks.argmax())}: "
        f"{reason}. Mark those rows as truncated or terminated; where next_observation is known and no "
        "termination is missing, columns={'truncated': None} ends episodes at such rows."
        f"{_unused_marks(table)}"
    )


def _missing_or_shifted(marks: Flags, breaks: Flags) -> str:
    """Why rows inside episodes break; ``marks``: ends that do not break."""
    for shift, place in ((1, "before"), (-1, "after")):
        if int((np.roll(marks, shift) & breaks).sum()) >= MOST * int(breaks.sum()):
            return f"the marks of ends are shifted: each lies one row {place} such a row"
    if breaks.sum() > 1:
        return "marks of ends are missing there"
    return (
        "a mark of an end is missing there, or it is where a ring buffer overwrote its oldest rows "
        "(begin the table with the row after it)"
    )


def _unrelated(table: Table, inside: Flags, count: int) -> str:
    """Most rows break: the sentence says what the next observations seem to be."""
    path, following = table.paths["next_observation"], table.next_observation
    reason = (
        "the next observations may be shifted, in another scale, or of other rows, or the rows are "
        "not in the order of time"
    )
    for ahead, meaning in (
        (0, "the same row's observation: they are copies, or shifted by one row to the end"),
        (2, "the observation two rows later: they are shifted by one row to the beginning"),
    ):
        equal = ~differs(table.observation, following, min(ROWS, len(inside)), ahead)
        rows = inside[: len(equal)]
        if 2 * (equal & rows).sum() > rows.sum():
            reason = f"{(equal & rows).sum()} of {rows.sum()} rows looked at contain {meaning}"
    return (
        f"next_observation ({path!r}) is not the following row's observation in {count} of "
        f"{int(inside.sum())} rows inside episodes: {reason}. Repair the column, or pass "
        "columns={'next_observation': None} to use the following rows. If the rows are shuffled "
        "transitions, each one is used as it stands, but lengths and returns of episodes have no "
        "meaning."
    )


def _restarts(table: Table, at_end: Flags, jumps: Flags) -> bool:
    """Whether most jumps lead to observations of which 3 of 4 columns are in the range of first ones.

    Where there are no more than ``FEWEST`` first ones, the range is widened.
    """
    values = float_values(table.observation, len(at_end) + 1)
    reached, starts = values[1:], values[np.append(True, at_end)]
    slack = 0.25 * values.std(axis=0) if len(starts) <= FEWEST else 0.0
    within = (reached >= starts.min(axis=0) - slack) & (reached <= starts.max(axis=0) + slack)
    similar = within.mean(axis=1) >= 0.75
    return bool(similar[jumps].mean() > 0.5 and similar[~at_end & ~jumps].mean() < 0.3)


def _unused_marks(table: Table) -> str:
    """A sentence that names an unused column that looks like marks of ends."""
    for name, column in table.unused.items():
        if name not in POSSIBLE_MARKS or isinstance(column, UnreadableColumn):
            continue
        values = np.asarray(column[:])
        if values.size == table.rows and np.isin(values, [0, 1]).all() and 0 < values.mean() < 0.5:
            return (
                f" The unused column {name!r} looks like marks of ends: "
                f"columns={{'truncated': {name!r}}} reads it."
            )
    return ""
