"""Tables of rows as transitions: the ends of episodes, and the successor of each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column
from iql_torchrl.data.readers.columns import Table, read_table
from iql_torchrl.data.readers.source import Piece, ReadOptions, Source, first_episodes
from iql_torchrl.data.readers.table_ends import Ends, table_ends
from iql_torchrl.data.readers.table_spaces import (
    check_shapes,
    guess_action_space,
    guess_observation_space,
)
from iql_torchrl.data.readers.table_warnings import mark_notes, mark_warnings
from iql_torchrl.data.schema import (
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

#: Most rows, and about the most bytes of observations, of one piece.
CHUNK = 65_536
CHUNK_BYTES = 16 * 2**20


def table_source(name: str, columns: dict[str, Column], options: ReadOptions) -> Source:
    """A ``Source`` of the columns.

    Trajectories, which all statistics count as episodes, end at rows marked terminated or
    truncated and where ``episode`` changes. Without truncation marks and episode numbers they also
    end where ``next_observation`` is not the following row's observation (norm of the difference
    above 1e-6 and above rounding), and after ``max_episode_steps``.

    OGBench's conventions (``ogbench.load_dataset``, version 1.2.2): a column ``masks``
    (``not_terminated``) is 0 where a row terminates and 1 elsewhere. In a file that has it, or has
    ``valids``, ``terminals`` marks only the last rows of trajectories: truncated unless ``masks``
    is 0 there. A row that terminates inside its trajectory is ``done`` and is not bootstrapped, but
    the episode continues. Where ``terminals`` is missing, or marks exactly the terminations, a
    trajectory continues after a termination only if the next row's observation is this row's
    ``next_observation``. ``columns={"terminated": "masks"}`` means the same as
    ``columns={"not_terminated": "masks"}``. A row where ``valids`` (``valid``) is 0 is no
    transition: it only supplies the next observation of the row before it.

    Terminations inside a trajectory numbered by ``episode`` are read in the same way where the next
    row evidently continues it (see ``table_ends.continued_rows``), and are an error elsewhere.

    Without ``next_observation`` the following row is the successor. At the end of an episode there
    is none: a truncated row is dropped and the row before it becomes the episode's last, truncated
    (D4RL's ``qlearning_dataset`` drops it too); a terminated row is kept with its own observation
    as successor, whose value is never used. An unknown mask of a successor allows all actions. With
    ``reward_offset=1`` row t gets the reward and the marks of row t+1, and the last row of each
    episode, whose reward is unknown, is dropped. ``notes`` counts what was dropped, ``warnings``
    names the marks that look wrong (see ``table_warnings``).
    """
    table = read_table(name, columns, options)
    observation_space = options.observation_space or guess_observation_space(table)
    action_space, space_notes, space_warnings = guess_action_space(table, options)
    check_shapes(table, observation_space, action_space)
    ends = table_ends(table, options)
    rows, marks, lengths, notes = _kept_rows(table, ends, options.reward_offset)
    inside = int(marks[rows, 0].sum() - marks[rows[np.cumsum(lengths) - 1], 0].sum())
    notes += mark_notes(table, ends, inside)
    warnings = mark_warnings(table, ends, inside, lengths)
    lengths = first_episodes(lengths, options.limit)
    if not lengths.sum():
        raise DatasetError(f"{name}: no transition is left of {table.rows} rows; {' '.join(notes)}")
    if lengths.sum() < len(rows):
        notes.append(f"limit: kept {lengths.sum()} of {len(rows)} transitions.")
        rows = rows[: lengths.sum()]

    size = _rows_of_piece(table)

    def pieces() -> Iterator[Piece]:
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            yield _piece(table, chosen, marks, ends.last, options.reward_offset)

    return Source(
        name=name,
        observation_space=observation_space,
        action_space=action_space,
        episode_lengths=lengths,
        pieces=pieces,
        masked="action_mask" in table.columns,
        log_prob="action_log_prob" in table.columns,
        ends_known="truncated" in table.columns and options.limit is None,
        terminates_inside=inside > 0,
        termination=table.paths.get("terminated", table.paths.get("trajectory_end")),
        notes=(*notes, *space_notes),
        warnings=(*warnings, *space_warnings),
    )


def _rows_of_piece(table: Table) -> int:
    """Rows of one piece: fewer than ``CHUNK`` of large observations, such as pictures."""
    row_bytes = sum(
        int(np.prod(column.shape[1:])) * np.dtype(column.dtype).itemsize
        for column in table.observation.values()
    )
    return max(1, min(CHUNK, CHUNK_BYTES // max(row_bytes, 1)))


def _kept_rows(
    table: Table, ends: Ends, reward_offset: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], list[str]]:
    """Rows that make transitions, their marks ``(table.rows, 2)``, episode lengths, and notes."""
    if reward_offset not in (0, 1):
        raise DatasetError(f"reward_offset: expected 0 or 1, got {reward_offset}")
    drop, notes = _dropped_rows(table, ends, reward_offset)
    marks = np.stack([ends.terminated, ends.truncated], axis=1)
    if reward_offset:
        # With a reward offset, the marks of a row belong to the transition into it.
        continuing = np.flatnonzero(~ends.last)
        marks[continuing] = marks[continuing + 1]
    else:
        # A row before a dropped row is truncated, unless it terminates.
        before = np.flatnonzero(drop) - 1
        before = before[(before >= 0) & ~ends.last[np.maximum(before, 0)]]
        marks[before, 1] = ~marks[before, 0]
    end_rows = np.flatnonzero(ends.last)
    counts = np.diff(np.concatenate([[0], end_rows + 1])) - drop[end_rows]
    empty = int((counts == 0).sum())
    if empty:
        notes.append(f"{empty} episodes of one row were dropped with that row.")
    return np.flatnonzero(~drop), marks, counts[counts > 0].astype(np.int64), notes


def _dropped_rows(
    table: Table, ends: Ends, reward_offset: int
) -> tuple[NDArray[np.bool_], list[str]]:
    """Rows that make no transition, ``(table.rows,)``, and notes on them."""
    last, terminated = ends.last, ends.terminated
    notes: list[str] = []
    drop = ~ends.valid
    if drop.any():
        notes.append(
            f"dropped {int(drop.sum())} rows of {table.rows} where {table.paths['valid']!r} is 0: "
            "they only contain the observation after a trajectory's last step."
        )
    if reward_offset:
        drop = drop | last
        notes.append(
            f"reward_offset: dropped {int(drop.sum())} last rows, whose reward is unknown."
        )
    elif table.next_observation is None:
        cut = last & ends.valid & ~terminated  # A terminated row needs no successor.
        drop = drop | cut
        if cut.any():
            notes.append(
                f"dropped {int(cut.sum())} truncated last rows of {table.rows}: without "
                "next_observation they have no successor."
            )
        own_successor = int((terminated & last & ~drop).sum())
        if own_successor:
            notes.append(
                f"{own_successor} terminated rows have no successor in the file; their own "
                "observation is used."
            )
    return drop, notes


def _piece(
    table: Table,
    rows: NDArray[np.int64],
    marks: NDArray[np.bool_],
    last: NDArray[np.bool_],
    reward_offset: int,
) -> Piece:
    """The transitions of the given rows, which increase."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    complete = len(rows) == stop - start
    local: Any = slice(None) if complete else rows - start

    def read(column: Column, shift: int = 0) -> NDArray[Any]:
        values = np.asarray(column[start + shift : stop + shift])
        if len(values) < stop - start:  # no row follows the last one
            values = np.concatenate([values, np.asarray(column[table.rows - 1 : table.rows])])
        picked: NDArray[Any] = values[local]
        return picked

    following = table.next_observation
    at_end = last[rows]
    piece: Piece = {}
    for key, column in table.observation.items():
        if following is not None:
            piece[key], piece[("next", *key)] = read(column), read(following[key])
            continue
        # One pass over the rows and the one after them: decoding pictures takes long.
        values = np.asarray(column[start : stop + 1])
        successors = (
            values[1:] if len(values) > stop - start else np.concatenate([values[1:], values[-1:]])
        )
        piece[key] = values[: stop - start][local]
        piece[("next", *key)] = _replaced(successors[local], at_end, piece[key])
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


def _replaced(
    values: NDArray[Any], selected: NDArray[np.bool_], replacements: NDArray[Any]
) -> NDArray[Any]:
    if not selected.any():
        return values
    replaced = values.copy()
    replaced[selected] = replacements[selected]
    return replaced
