"""Tables of rows as transitions: where one episode ends, and what each row's successor is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.columns import Column, Table, read_table
from iql_torchrl.data.sources import Piece, ReadOptions, Source, first_episodes
from iql_torchrl.data.table_spaces import (
    check_shapes,
    guess_action_space,
    guess_observation_space,
)
from iql_torchrl.data.transitions import (
    ACTION,
    LOG_PROB,
    MASK,
    NEXT_MASK,
    REWARD,
    TERMINATED,
    TRUNCATED,
    DatasetError,
)

__all__ = ["table_source"]

CHUNK = 65_536


def table_source(name: str, columns: dict[str, Column], options: ReadOptions) -> Source:
    """A ``Source`` over the columns.

    Episodes end at rows marked terminated or truncated and where ``episode`` changes; with
    neither truncation marks nor episodes, also where ``next_observation`` is not the following
    row's observation (norm of the difference above 1e-6), and after ``max_episode_steps``.

    Without ``next_observation`` the following row is the successor. At an episode's end there is
    none: a truncated row is dropped and the row before it becomes the episode's last, truncated
    (D4RL's ``qlearning_dataset`` drops it too); a terminated row is kept with its own observation
    as successor, which no value is ever read from. A successor's mask that is unknown allows all
    actions. With ``reward_offset=1`` the reward of row t+1
    is row t's, and the last row of each episode, whose reward is unknown, lends its marks to the
    row before it and is dropped. ``notes`` counts what was dropped.
    """
    table = read_table(name, columns, options)
    ends = _ends(table, options)
    rows, marks, lengths, notes = _kept_rows(table, ends, options.reward_offset)
    notes += _doubts(table)
    lengths = first_episodes(lengths, options.limit)
    if not lengths.sum():
        raise DatasetError(f"{name}: no transition is left of {table.rows} rows; {' '.join(notes)}")
    if lengths.sum() < len(rows):
        notes.append(f"limit: kept {lengths.sum()} of {len(rows)} transitions.")
        rows = rows[: lengths.sum()]
    observation_space = options.observation_space or guess_observation_space(table)
    action_space, remarks, warned = guess_action_space(table, options)
    check_shapes(table, observation_space, action_space)

    def pieces() -> Iterator[Piece]:
        for start in range(0, len(rows), CHUNK):
            chosen = rows[start : start + CHUNK]
            yield _piece(table, chosen, marks, ends, options.reward_offset)

    return Source(
        name=name,
        observation_space=observation_space,
        action_space=action_space,
        episode_lengths=lengths,
        pieces=pieces,
        masked="action_mask" in table.columns,
        log_prob="action_log_prob" in table.columns,
        ends_known="truncated" in table.columns and options.limit is None,
        notes=(*notes, *remarks),
        warnings=warned,
    )


def _ends(table: Table, options: ReadOptions) -> NDArray[np.bool_]:
    """True at the last row of each episode."""
    terminated, truncated = table.flags("terminated"), table.flags("truncated")
    assert terminated is not None
    ends: NDArray[np.bool_] = terminated if truncated is None else terminated | truncated
    ends = ends.copy()
    ends[-1] = True
    if (episode := table.columns.get("episode")) is not None:
        ids = np.asarray(episode[:]).reshape(-1)
        changes = ids[1:] != ids[:-1]
        inside = np.flatnonzero(ends[:-1] & ~changes)
        if len(inside):
            raise DatasetError(
                f"{table.name}: {len(inside)} rows are marked as ends although the episode number "
                f"goes on, first at row {inside[0]}; wanted marks and numbers to agree."
            )
        ends[:-1] |= changes
    elif truncated is None and table.next_observation is not None:
        ends[:-1] |= _breaks(table)
    elif truncated is None and not options.max_episode_steps and not table.truncation_ignored:
        raise DatasetError(
            f"{table.name}: neither truncated, episode nor next_observation says where episodes "
            "end besides termination; pass max_episode_steps or env, name one with columns={...}, "
            "or columns={'truncated': None} if every episode terminates."
        )
    if options.max_episode_steps and truncated is None:
        ends = _cut_long(ends, options.max_episode_steps)
    return ends


def _breaks(table: Table) -> NDArray[np.bool_]:
    """Where a row's successor is not the following row, ``(rows - 1,)``."""
    assert table.next_observation is not None
    broken = np.zeros(table.rows - 1, np.bool_)
    for start in range(0, table.rows - 1, CHUNK):
        stop = min(start + CHUNK, table.rows - 1)
        gap = np.zeros(stop - start)
        for key, column in table.observation.items():
            ahead = np.asarray(column[start + 1 : stop + 1], np.float64)
            after = np.asarray(table.next_observation[key][start:stop], np.float64)
            gap += np.square(ahead - after).reshape(stop - start, -1).sum(1)
        # Not-a-number is the validator's to name, not a border.
        broken[start:stop] = np.sqrt(np.nan_to_num(gap)) > 1e-6
    return broken


def _cut_long(ends: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    last = np.flatnonzero(ends)
    first = np.concatenate([[0], last[:-1] + 1])
    row = np.arange(len(ends))
    age = row - np.repeat(first, last - first + 1)
    cut: NDArray[np.bool_] = ends | ((age + 1) % steps == 0)
    return cut


def _kept_rows(
    table: Table, ends: NDArray[np.bool_], reward_offset: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], list[str]]:
    """Rows that make transitions, their marks ``(table.rows, 2)``, episode lengths, and notes."""
    if reward_offset not in (0, 1):
        raise DatasetError(f"reward_offset: wanted 0 or 1, got {reward_offset}")
    terminated, truncated = table.flags("terminated"), table.flags("truncated")
    assert terminated is not None
    # Where the file has truncation marks, an end without one is left for the checker to report.
    cut = ends & ~terminated if truncated is None else truncated
    marks = np.stack([terminated, cut], axis=1)
    notes: list[str] = []
    drop = np.zeros_like(ends)
    if reward_offset:
        drop = ends.copy()
        notes.append(
            f"reward_offset: dropped {int(drop.sum())} last rows, whose reward is unknown."
        )
    elif table.next_observation is None:
        drop = ends & ~(terminated & ~cut)
        if drop.any():
            notes.append(
                f"dropped {int(drop.sum())} truncated last rows of {table.rows}: without "
                "next_observation they have no successor."
            )
        kept_own = int((terminated & ~drop).sum())
        if kept_own:
            notes.append(
                f"{kept_own} terminated rows have no successor in the file; their own observation "
                "stands in."
            )
    before = np.flatnonzero(drop) - 1
    before = before[(before >= 0) & ~ends[np.maximum(before, 0)]]
    # The dropped row's marks describe the arrival in it, if rewards are late; otherwise the data
    # merely stops there.
    marks[before] = marks[before + 1] if reward_offset else (False, True)
    last = np.flatnonzero(ends)
    counts = np.diff(np.concatenate([[0], last + 1])) - drop[last]
    empty = int((counts == 0).sum())
    if empty:
        notes.append(f"{empty} episodes of one row vanished with their only row.")
    return np.flatnonzero(~drop), marks, counts[counts > 0].astype(np.int64), notes


def _doubts(table: Table) -> list[str]:
    """A note where truncation marks lie inside smooth motion, judged on the leading rows."""
    truncated, column = table.flags("truncated"), table.observation.get(("observation",))
    if truncated is None or column is None or table.next_observation is not None:
        return []
    if np.dtype(column.dtype).kind != "f":
        return []
    head = np.asarray(column[:CHUNK], np.float64)
    jumps = np.linalg.norm(np.diff(head.reshape(len(head), -1), axis=0), axis=1)
    marked = truncated[: len(jumps)]
    ended = table.flags("terminated")
    assert ended is not None
    inside = ~marked & ~ended[: len(jumps)]
    if not marked.any() or not inside.any():
        return []
    smooth = int((jumps[marked] <= np.quantile(jumps[inside], 0.99)).sum())
    if smooth < 0.9 * marked.sum():
        return []
    return [
        f"{smooth} of {int(marked.sum())} truncated rows are followed by an observation as near as "
        "any within an episode: the marks may be misplaced; columns={'truncated': None} reads past "
        "them."
    ]


def _piece(
    table: Table,
    rows: NDArray[np.int64],
    marks: NDArray[np.bool_],
    ends: NDArray[np.bool_],
    reward_offset: int,
) -> Piece:
    """The transitions of the given rows, which increase."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    whole = len(rows) == stop - start
    local: Any = slice(None) if whole else rows - start

    def read(column: Column, shift: int = 0) -> NDArray[Any]:
        values = np.asarray(column[start + shift : stop + shift])
        if len(values) < stop - start:  # The very last row has no follower.
            values = np.concatenate([values, np.asarray(column[table.rows - 1 : table.rows])])
        picked: NDArray[Any] = values[local]
        return picked

    following = table.next_observation
    at_end = ends[rows]
    piece: Piece = {}
    for key, column in table.observation.items():
        piece[key] = read(column)
        if following is not None:
            piece[("next", *key)] = read(following[key])
        else:
            piece[("next", *key)] = _replaced(read(column, 1), at_end, piece[key])
    piece[ACTION] = read(table.columns["action"])
    piece[REWARD] = read(table.columns["reward"], reward_offset).reshape(-1)
    piece[TERMINATED], piece[TRUNCATED] = marks[rows, 0], marks[rows, 1]
    if (mask := table.columns.get("action_mask")) is not None:
        piece[MASK] = read(mask)
        if (next_mask := table.columns.get("next_action_mask")) is not None:
            piece[NEXT_MASK] = read(next_mask)
        else:
            piece[NEXT_MASK] = _replaced(read(mask, 1), at_end, np.ones_like(piece[MASK]))
    if (log_prob := table.columns.get("action_log_prob")) is not None:
        piece[LOG_PROB] = read(log_prob).reshape(-1)
    return piece


def _replaced(values: NDArray[Any], where: NDArray[np.bool_], others: NDArray[Any]) -> NDArray[Any]:
    if not where.any():
        return values
    replaced = values.copy()
    replaced[where] = others[where]
    return replaced
