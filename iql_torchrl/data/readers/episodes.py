"""A table's episodes: where they end, which row follows which, and what contradicts the marks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.columns import (
    Flags,
    Table,
    guess_action_space,
    guess_observation_space,
    read_table,
    text_as_floats,
)
from iql_torchrl.data.readers.contradictions import MANY, Ends, continued_rows
from iql_torchrl.data.readers.hints import boundary_hints, interleaved_by
from iql_torchrl.data.readers.source import Piece, ReadOptions, Source
from iql_torchrl.data.schema import (
    ACTION,
    LOG_PROB,
    MASK,
    REWARD,
    TERMINATED,
    TRUNCATED,
    DatasetError,
    leaf_spaces,
)

#: Most rows, and about the most bytes of observations, of one piece.
CHUNK = 65_536
CHUNK_BYTES = 16 * 2**20


def table_source(opened: Columns, options: ReadOptions) -> Source:
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
    row evidently continues it (see ``contradictions.continued_rows``), and are an error elsewhere.

    Without ``next_observation`` the following row is the successor. At the end of an episode there
    is none: a truncated row is dropped and the row before it becomes the episode's last, truncated
    (D4RL's ``qlearning_dataset`` drops it too); a terminated row is kept with its own observation
    as successor, whose value is never used. An unknown mask of a successor allows all actions. With
    ``reward_offset=1`` row t gets the reward and the marks of row t+1, and the last row of each
    episode, whose reward is unknown, is dropped. ``notes`` counts what was dropped, ``warnings``
    names the marks that look wrong.
    """
    table = read_table(opened.name, opened.columns, options)
    observation_space = options.observation_space or opened.observation_space
    if observation_space is None:
        observation_space = guess_observation_space(table)
    action_space, note, warning = options.action_space or opened.action_space, "", ""
    if action_space is None:
        action_space, note, warning = guess_action_space(table)
    if opened.text:
        text_as_floats(
            table, leaf_spaces(observation_space) | {ACTION: action_space}, options.dtype
        )
    ends = table_ends(table, options)
    rows, marks, lengths, notes = _transitions(table, ends, options.reward_offset)
    if not len(rows):
        raise DatasetError(
            f"{table.name}: no transition is left of {table.rows} rows; {' '.join(notes)}"
        )
    inside = int(marks[:, 0].sum() - marks[np.cumsum(lengths) - 1, 0].sum())
    row_bytes = sum(
        int(np.prod(column.shape[1:])) * np.dtype(column.dtype).itemsize
        for column in table.observation.values()
    )
    size = max(1, min(CHUNK, CHUNK_BYTES // max(row_bytes, 1)))

    def pieces() -> Iterator[Piece]:
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            piece = _piece(table, chosen, ends.last[chosen], options.reward_offset)
            piece[TERMINATED], piece[TRUNCATED] = marks[start : start + size].T
            yield piece

    if "episode" not in table.paths and (envs := interleaved_by(table.observation)):
        raise DatasetError(
            f"{table.name}: the rows of {envs} environments are interleaved (row = t * {envs} + env); sort "
            "them by environment, or number each environment's episodes in a column 'episode'."
        )
    doubts = boundary_hints(
        table.observation, table.next_observation, table.columns[REWARD], ends.terminated, ends.last,
        names=table.paths, ids_given="episode" in table.paths, unused=table.unused,
    )  # fmt: skip
    doubts += filter(None, [_little_kept(table, ends, lengths, bool(doubts)), warning])
    return Source(
        name=table.name,
        observation_space=observation_space,
        action_space=action_space,
        episode_lengths=lengths,
        pieces=pieces,
        masked=MASK in table.columns,
        log_prob=LOG_PROB in table.columns,
        ends_known="truncated" in table.paths,
        terminates_inside=inside > 0,
        paths=table.paths,
        env_spec=opened.env_spec,
        notes=(*opened.notes, *notes, *_mark_notes(table, ends, inside), *filter(None, [note])),
        warnings=(*opened.warnings, *(f"{table.name}: {text}" for text in doubts)),
    )


def _transitions(
    table: Table, ends: Ends, reward_offset: int
) -> tuple[NDArray[np.int64], Flags, NDArray[np.int64], list[str]]:
    """Rows that make transitions, their marks ``(n, 2)``, lengths of their episodes, and notes."""
    if reward_offset not in (0, 1):
        raise DatasetError(f"reward_offset: expected 0 or 1, got {reward_offset}")
    last, drop, notes = ends.last, ~table.flags["valid"], []
    marks = np.stack([ends.terminated, ends.truncated], axis=1)
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
        # The marks of a row belong to the transition into it.
        continuing = np.flatnonzero(~last)
        marks[continuing] = marks[continuing + 1]
    else:
        if not table.next_observation:
            cut = last & ~drop & ~ends.terminated  # A terminated row needs no successor.
            drop = drop | cut
            if cut.any():
                notes.append(
                    f"dropped {int(cut.sum())} truncated last rows of {table.rows}: without "
                    "next_observation they have no successor."
                )
            if own_successor := int((ends.terminated & last & ~drop).sum()):
                notes.append(
                    f"{own_successor} terminated rows have no successor in the file; their own "
                    "observation is used."
                )
        # A row before a dropped row is truncated, unless it terminates.
        before = np.flatnonzero(drop[1:] & ~last[:-1])
        marks[before, 1] = ~marks[before, 0]
    end_rows = np.flatnonzero(last)
    lengths = np.diff(end_rows, prepend=-1) - drop[end_rows]
    if empty := int((lengths == 0).sum()):
        notes.append(f"{empty} episodes of one row were dropped with that row.")
    rows = np.flatnonzero(~drop)
    return rows, marks[rows], lengths[lengths > 0].astype(np.int64), notes


def _piece(table: Table, rows: NDArray[np.int64], at_end: Flags, reward_offset: int) -> Piece:
    """The transitions of the given rows, which increase, without their marks.

    Without a known successor, an observation is its own and every action is allowed.
    """
    start, stop = int(rows[0]), int(rows[-1]) + 1
    here: Any = slice(0, len(rows)) if len(rows) == stop - start else rows - start
    after = rows - start + ~at_end
    piece: Piece = {}
    for key, column in table.columns.items():
        values = np.asarray(column[start : stop + 1])  # once for both: decoding takes long
        piece[key] = values[after if key == REWARD and reward_offset else here]
        following = ("next", *key)
        if (key == MASK or key[0] == "observation") and following not in table.columns:
            piece[following] = values[after]
            if key == MASK:
                piece[following][at_end] = 1
    piece[REWARD] = piece[REWARD].reshape(-1)
    return piece


def table_ends(table: Table, options: ReadOptions) -> Ends:
    """Reads the marks; see ``table_source`` for the rules."""
    has, broken = table.paths.keys(), table.broken
    terminated, truncated, end, valid = (
        table.flags[key] for key in ("terminated", "truncated", "trajectory_end", "valid")
    )
    others = "valid" in has or ("trajectory_end" in has and not np.array_equal(end, terminated))
    last = truncated | end
    # A termination ends its trajectory, unless another column says where trajectories end.
    if "not_terminated" in has and broken is not None and not has & {"trajectory_end", "valid"}:
        last[:-1] |= terminated[:-1] & broken
    elif "not_terminated" not in has or not others:
        last |= terminated
    last = (last & valid & np.append(valid[1:], True)) | ~valid
    last[-1] = True
    unmarked = not others and "truncated" not in has
    if table.episode is not None:
        last = _numbered(table, last, table.episode)
    elif unmarked and broken is not None:
        last[:-1] |= broken
    elif (
        unmarked
        and "trajectory_end" not in has
        and not options.max_episode_steps
        and options.columns.get("truncated", "") is not None
    ):
        raise DatasetError(
            f"{table.name}: neither truncated, episode nor next_observation shows where episodes "
            "end besides termination; pass max_episode_steps or env, name one with columns={...}, "
            "or columns={'truncated': None} if every episode terminates."
        )
    if unmarked and options.max_episode_steps:
        row = np.arange(table.rows)
        first = np.maximum.accumulate(np.where(np.append(True, last[:-1]), row, 0))
        last = last | ((row - first + 1) % options.max_episode_steps == 0)
    if "truncated" not in has or has & {"trajectory_end", "valid"}:
        truncated = last & ~terminated
    elif "not_terminated" in has:
        truncated = truncated & ~terminated
    return Ends(terminated, truncated, last)


def _numbered(table: Table, last: Flags, ids: NDArray[Any]) -> Flags:
    """Ends of trajectories that ``ids`` number."""
    if (unknown := np.flatnonzero(~np.isfinite(ids))).size:
        raise DatasetError(
            f"{table.name}: episode ({table.paths['episode']!r}) is NaN or infinite in "
            f"{len(unknown)} of {table.rows} rows, first at row {unknown[0]}; expected one number "
            "per episode."
        )
    changes = np.append(ids[1:] != ids[:-1], True)
    wrong = last & ~changes & table.flags["valid"]
    if wrong.any() and not (wrong & ~table.flags["terminated"]).any():
        if table.broken is not None:
            continues = not (table.broken & wrong[:-1]).any()
        else:
            continues = continued_rows(table, wrong, ~wrong & ~changes) > 0
        if continues:
            return (last & ~wrong) | changes
    if wrong.any():
        raise DatasetError(
            f"{table.name}: {int(wrong.sum())} rows are marked as ends although the episode number "
            f"continues, first at row {int(wrong.argmax())}; expected marks and numbers to agree. A "
            "termination within an episode is read as such only where the next row evidently "
            "continues the motion."
        )
    return last | changes


def _mark_notes(table: Table, ends: Ends, inside: int) -> list[str]:
    """How marks with ambiguous names were read; ``inside``: terminations inside trajectories."""
    notes = []
    if (path := table.paths.get("not_terminated")) is not None:
        notes.append(
            f"{path!r} was read as 0 where a row terminates and 1 elsewhere "
            f"({int((ends.terminated & table.flags['valid']).sum())} terminations)."
        )
    if (path := table.paths.get("trajectory_end")) is not None:
        notes.append(f"{path!r} was read as ends of trajectories, not as terminations.")
    if inside:
        notes.append(
            f"{inside} rows terminate inside a trajectory that continues: bootstrapping stops there, "
            "the episode does not end."
        )
    return notes


def _little_kept(table: Table, ends: Ends, lengths: NDArray[np.int64], explained: bool) -> str:
    """Most rows dropped, or most episodes of one row that no mark ends, if this is not explained."""
    remedy = (
        "check which column marks the ends of episodes and whether it is 1 where an episode ends "
        "(columns={...} names it)"
    )
    rows, remaining = int(table.flags["valid"].sum()), int(lengths.sum())
    if rows > MANY and 2 * remaining < rows:
        return f"only {remaining} of {rows} rows make transitions, see the notes: {remedy}."
    single = int((lengths == 1).sum())
    marked = ends.terminated | (ends.truncated if "truncated" in table.paths else False)
    mostly_marked = 2 * int((ends.last & marked).sum()) > int(ends.last.sum())
    if explained or mostly_marked or len(lengths) <= MANY or 2 * single <= len(lengths):
        return ""
    return f"{single} of {len(lengths)} episodes have one row: {remedy}."
