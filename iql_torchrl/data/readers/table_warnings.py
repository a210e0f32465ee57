"""Sentences about the end marks of a table, for ``Source.notes`` and ``Source.warnings``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.columns import TRAJECTORY_ENDS, Table
from iql_torchrl.data.readers.motion import ROWS, looked_at, motion
from iql_torchrl.data.readers.table_ends import MOST, Ends, continued_rows
from iql_torchrl.data.readers.table_jumps import jump_warning, unused_marks
from iql_torchrl.data.readers.table_successors import successor_warning

__all__ = ["mark_notes", "mark_warnings"]

#: Up to this many rows or episodes there is no warning about dropped rows or short episodes.
MANY = 20


def mark_notes(table: Table, ends: Ends, inside: int) -> list[str]:
    """How marks with ambiguous names were read; ``inside``: terminations inside trajectories."""
    notes = []
    if (path := table.paths.get("not_terminated")) is not None:
        notes.append(
            f"{path!r} was read as 0 where a row terminates and 1 elsewhere "
            f"({int((ends.terminated & ends.valid).sum())} terminations)."
        )
    if (path := table.paths.get("trajectory_end")) is not None:
        notes.append(f"{path!r} was read as ends of trajectories, not as terminations.")
    if inside:
        notes.append(
            f"{inside} rows terminate inside a trajectory that continues: bootstrapping stops there, "
            "the episode does not end."
        )
    return notes


def mark_warnings(table: Table, ends: Ends, inside: int, lengths: NDArray[np.int64]) -> list[str]:
    """Marks that the rows contradict, one sentence each.

    ``lengths``: number of kept rows of each episode.
    """
    texts = [_no_terminations(table), _mostly_terminated(table, ends, inside)]
    if "episode" not in table.columns and ends.valid.all():
        texts += [_misplaced(table), _continued(table, ends), _no_ends(table, ends)]
    if not any(texts):
        texts.append(_inverted(table, ends))
    if not any(texts):
        texts += [successor_warning(table, ends), jump_warning(table, ends)]
    texts.append(_little_kept(table, ends, lengths, any(texts)))
    return [f"{table.name}: {text}" for text in texts if text is not None]


def _little_kept(
    table: Table, ends: Ends, lengths: NDArray[np.int64], explained: bool
) -> str | None:
    """Most rows dropped, or most episodes of one row without a mark that ends them.

    ``explained``: another warning already gives the reason why episodes have one row.
    """
    remedy = (
        "check which column marks the ends of episodes and whether it is 1 where an episode ends "
        "(columns={...} names it)"
    )
    rows, remaining = int(ends.valid.sum()), int(lengths.sum())
    if rows > MANY and 2 * remaining < rows:
        return f"only {remaining} of {rows} rows make transitions, see the notes: {remedy}."
    single = int((lengths == 1).sum())
    truncated = table.flags("truncated")
    marked = ends.terminated if truncated is None else ends.terminated | truncated
    if explained or 2 * int((ends.last & marked).sum()) > int(ends.last.sum()):
        return None
    if len(lengths) <= MANY or 2 * single <= len(lengths):
        return None
    return f"{single} of {len(lengths)} episodes have one row: {remedy}."


def _no_terminations(table: Table) -> str | None:
    """A warning if ends are marked, but no column marks which of them terminate."""
    marked = "terminated" in table.columns or "not_terminated" in table.columns
    if marked or (path := table.paths.get("trajectory_end")) is None:
        return None
    return (
        f"no column marks which rows terminate: together with {table.paths['valid']!r}, {path!r} "
        "marks ends of trajectories, and all of them were read as truncated. Add 'masks' (0 where a "
        "row terminates), or pass columns={'terminated': None, 'truncated': "
        f"{path!r}}} if none does."
    )


def _mostly_terminated(table: Table, ends: Ends, inside: int) -> str | None:
    share = inside / max(1, int((ends.valid & ~ends.last).sum()))
    if share <= MOST:
        return None
    opposite = "not_terminated" in table.columns
    path = table.paths["not_terminated" if opposite else "terminated"]
    opposite_key = "terminated" if opposite else "not_terminated"
    return (
        f"{path!r} says that {inside} rows terminate inside trajectories that continue, {share:.0%} of "
        f"them: it may mean the opposite. columns={{{opposite_key!r}: {path!r}}} reads it in this way."
    )


def _inverted(table: Table, ends: Ends) -> str | None:
    """A warning if more than ``MOST`` of the rows terminate and most evidently continue.

    In logs of bandits the following row is not the successor, and there is no warning.
    """
    path = table.paths.get("terminated")
    if path is None or table.rows <= MANY or "not_terminated" in table.columns:
        return None
    share = float(ends.terminated.mean())
    if share <= MOST or (ends.broken is not None and 2 * ends.broken.sum() > len(ends.broken)):
        return None
    moved = motion(table)
    if moved is None or float(np.quantile(moved.error, 0.9)) >= moved.unrelated:
        return None
    return (
        f"{path!r} marks {share:.0%} of the rows as terminated, although most rows are followed by "
        f"their own successor: it may mean the opposite. columns={{'not_terminated': {path!r}}} "
        "reads it in this way."
    )


def _misplaced(table: Table) -> str | None:
    """A warning about truncation marks where the following row continues a smooth motion."""
    truncated = table.flags("truncated")
    if truncated is None or table.next_observation is not None or not truncated[:-1].any():
        return None
    if (moved := motion(table)) is None:
        return None
    marked = truncated[: len(moved.error)]
    unmarked = ~marked & ~table.terminated()[: len(marked)]
    smooth = moved.inside(marked, unmarked)
    if smooth is None or smooth < MOST * marked.sum():
        return None
    return (
        f"{smooth} of {int(marked.sum())} rows marked truncated ({table.paths['truncated']!r})"
        f"{looked_at(table)} are followed by an observation that continues their motion as well as "
        "any within an episode: the marks may be misplaced. columns={'truncated': None} ignores "
        "them, and episodes then end at terminations only."
    )


def _continued(table: Table, ends: Ends) -> str | None:
    """A warning about terminations after which the trajectory evidently continues."""
    if (path := table.paths.get("terminated")) is None or "not_terminated" in table.columns:
        return None
    rows = ends.terminated & ends.last
    if not rows[:-1].any() or not (
        count := continued_rows(motion(table), rows, ~ends.last, ends.broken)
    ):
        return None
    total = int(rows[: min(table.rows, ROWS) - 1].sum())
    return (
        f"{count} of the {total} rows marked terminated ({path!r}){looked_at(table)} are followed "
        "by a row that continues the same trajectory, yet each was read as the end of an episode. If "
        f"{path!r} only marks where recording was cut, pass columns={{'terminated': None, "
        f"'truncated': {path!r}}}; if it is 0 where a row terminates, columns={{'not_terminated': "
        f"{path!r}}}; if trajectories do continue after a termination, number them in a column and "
        "name it with columns={'episode': ...}."
    )


def _no_ends(table: Table, ends: Ends) -> str | None:
    """A warning if no row is marked although rows do not follow each other."""
    if ends.last[:-1].any() or ends.terminated.any():
        return None
    if "truncated" not in table.columns and not table.truncation_ignored:
        return None
    if ends.broken is not None:
        count = int(ends.broken.sum())
        if count > len(ends.broken) / 2:
            return None  # Rows that do not follow each other at all: see ``successor_warning``.
        reason = "whose next_observation is not the following row's observation"
    else:
        moved = motion(table)
        count = 0 if moved is None else int(moved.jumps.sum())
        reason = "from which the observation jumps to the following row's" + looked_at(table)
    if not count:
        return None
    path, names = table.paths.get("truncated"), ", ".join(map(repr, TRAJECTORY_ENDS))
    zero = "" if path is None else f" ({path!r} is 0 throughout)"
    return (
        f"no row is marked terminated or truncated{zero}, but there are "
        f"{count} rows {reason}: the whole table was read as one episode. Pass columns={{'truncated': "
        "None} with max_episode_steps=, or name the column that marks ends of trajectories "
        f"(such as {names}) with columns={{'truncated': ...}} or numbers them with "
        f"columns={{'episode': ...}}.{unused_marks(table)}"
    )
