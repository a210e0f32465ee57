"""A table's episodes: where they end, which row follows which, and what contradicts the marks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Opened, UnreadableColumn
from iql_torchrl.data.readers.columns import (
    TRAJECTORY_ENDS,
    Table,
    check_shapes,
    guess_action_space,
    guess_observation_space,
    read_table,
    whole_numbers_as_floats,
)
from iql_torchrl.data.readers.motion import (
    MOST,
    ROWS,
    continued_rows,
    differs,
    float_values,
    motion,
)
from iql_torchrl.data.readers.source import Piece, ReadOptions, Source
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

Flags = NDArray[np.bool_]
#: Most rows, and about the most bytes of observations, of one piece.
CHUNK = 65_536
CHUNK_BYTES = 16 * 2**20
#: Columns that mark ends of trajectories other than terminations.
MARKS = ("truncated", "trajectory_end", "valid", "episode")
#: Smallest number of jumps inside episodes that is reported.
FEWEST = 3
#: Up to this many rows or episodes there is no warning about dropped rows or short episodes.
MANY = 20
#: Names of columns that often mark ends, in files that have no column of our names for them.
POSSIBLE_MARKS = (
    "episode_terminals", "dones", "done", "next/done", "dones_float", "terminals", "timeouts",
    "timeout", "is_last", "episode_ends",
)  # fmt: skip


def table_source(opened: Opened, options: ReadOptions) -> Source:
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
    row evidently continues it (see ``motion.continued_rows``), and are an error elsewhere.

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
    check_shapes(table, observation_space, action_space)
    if opened.text:
        whole_numbers_as_floats(table, observation_space, action_space, options.dtype)
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

    contradictions = _contradictions(table, ends, inside)
    little = _little_kept(table, ends, lengths, bool(contradictions))
    doubts = [text for text in (*contradictions, little, warning) if text]
    return Source(
        name=table.name,
        observation_space=observation_space,
        action_space=action_space,
        episode_lengths=lengths,
        pieces=pieces,
        masked="action_mask" in table.columns,
        log_prob="action_log_prob" in table.columns,
        ends_known="truncated" in table.columns,
        terminates_inside=inside > 0,
        termination=table.paths.get("terminated", table.paths.get("trajectory_end")),
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
    last, drop, notes = ends.last, ~ends.valid, []
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
        if table.next_observation is None:
            cut = last & ends.valid & ~ends.terminated  # A terminated row needs no successor.
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
    """The transitions of the given rows, which increase, without their marks."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    complete = len(rows) == stop - start
    here: Any = slice(0, len(rows)) if complete else rows - start
    after: Any = slice(1, len(rows) + 1) if complete else rows - start + 1

    def read(column: Column) -> tuple[NDArray[Any], NDArray[Any]]:
        """The values of the rows and of the rows after them, read once: decoding takes long."""
        values = np.asarray(column[start : stop + 1])
        if stop == table.rows:  # no row follows the last one
            values = np.concatenate([values, values[-1:]])
        return values[here], values[after]

    def replaced(successors: NDArray[Any], at_ends: NDArray[Any]) -> NDArray[Any]:
        return np.where(at_end.reshape(-1, *[1] * (successors.ndim - 1)), at_ends, successors)

    piece: Piece = {}
    for key, column in table.observation.items():
        piece[key], successors = read(column)
        if table.next_observation is None:
            piece[("next", *key)] = replaced(successors, piece[key])
        else:
            piece[("next", *key)] = read(table.next_observation[key])[0]
    piece[ACTION] = read(table.columns["action"])[0]
    piece[REWARD] = read(table.columns["reward"])[reward_offset].reshape(-1)
    if (mask := table.columns.get("action_mask")) is not None:
        piece[MASK], successors = read(mask)
        if (next_mask := table.columns.get("next_action_mask")) is not None:
            piece[NEXT_MASK] = read(next_mask)[0]
        else:
            piece[NEXT_MASK] = replaced(successors, np.ones_like(piece[MASK]))
    if (log_prob := table.columns.get("action_log_prob")) is not None:
        piece[LOG_PROB] = read(log_prob)[0].reshape(-1)
    return piece


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
    terminated, truncated = table.terminated, table.flags.get("truncated")
    end, valid = table.flags.get("trajectory_end"), table.flags.get("valid")
    broken = None
    if table.next_observation is not None:
        broken = differs(table.observation, table.next_observation, table.rows)
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
    elif unmarked and end is None and not (options.max_episode_steps or table.truncation_ignored):
        raise DatasetError(
            f"{table.name}: neither truncated, episode nor next_observation shows where episodes "
            "end besides termination; pass max_episode_steps or env, name one with columns={...}, "
            "or columns={'truncated': None} if every episode terminates."
        )
    if unmarked and options.max_episode_steps:
        row = np.arange(table.rows)
        first = np.maximum.accumulate(np.where(np.append(True, last[:-1]), row, 0))
        last = last | ((row - first + 1) % options.max_episode_steps == 0)
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
    if (unknown := np.flatnonzero(~np.isfinite(ids))).size:
        raise DatasetError(
            f"{table.name}: episode ({table.paths['episode']!r}) is NaN or infinite in "
            f"{len(unknown)} of {table.rows} rows, first at row {unknown[0]}; expected one number "
            "per episode."
        )
    changes = np.append(ids[1:] != ids[:-1], True)
    wrong = last & ~changes
    if valid is not None:
        wrong &= valid
    if wrong.any() and not (wrong & ~terminated).any():
        if broken is not None:
            continues = not (broken & wrong[:-1]).any()
        else:
            continues = continued_rows(table, wrong, ~wrong & ~changes, None) > 0
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


def _contradictions(table: Table, ends: Ends, inside: int) -> list[str]:
    """Sentences about marks that the rows contradict; successors count where the marks agree."""
    texts = [
        _no_terminations(table) or _opposite(table, ends, inside),
        _continued(table, ends, "terminated"),
    ]
    if ends.broken is None:
        texts.append(_continued(table, ends, "truncated"))
    if not any(texts):
        texts.append(_breaks_inside(table, ends) or _continued(table, ends, "truncated"))
    return [text for text in texts if text]


def _little_kept(table: Table, ends: Ends, lengths: NDArray[np.int64], explained: bool) -> str:
    """Most rows dropped, or most episodes of one row that no mark ends, if this is not explained."""
    remedy = (
        "check which column marks the ends of episodes and whether it is 1 where an episode ends "
        "(columns={...} names it)"
    )
    rows, remaining = int(ends.valid.sum()), int(lengths.sum())
    if rows > MANY and 2 * remaining < rows:
        return f"only {remaining} of {rows} rows make transitions, see the notes: {remedy}."
    single = int((lengths == 1).sum())
    marked = ends.terminated | (ends.truncated if "truncated" in table.columns else False)
    mostly_marked = 2 * int((ends.last & marked).sum()) > int(ends.last.sum())
    if explained or mostly_marked or len(lengths) <= MANY or 2 * single <= len(lengths):
        return ""
    return f"{single} of {len(lengths)} episodes have one row: {remedy}."


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
    if "not_terminated" in table.columns:
        key, opposite = "not_terminated", "terminated"
        share = inside / max(1, int((ends.valid & ~ends.last).sum()))
        evident = share > MOST
    else:
        key, opposite, share = "terminated", "not_terminated", float(ends.terminated.mean())
        broken = ends.broken is not None and 2 * int(ends.broken.sum()) > len(ends.broken)
        moved = motion(table) if share > MOST and table.rows > MANY and not broken else None
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
    broken, known = ends.broken, ends.broken is not None and key == "truncated"
    paths = [table.paths[k] for k in (MARKS if known else (key,)) if k in table.paths]
    if not paths or not ends.valid.all() or (not known and "episode" in table.columns):
        return ""
    if key == "terminated" and "not_terminated" in table.columns:
        return ""
    marked = ends.terminated if key == "terminated" else ends.truncated & ~ends.terminated
    rows = ends.last & marked
    if broken is not None and key == "truncated":
        rows = rows[:-1]
        count = int((rows & ~broken).sum())
        if rows.sum() < FEWEST or count < MOST * rows.sum():
            return ""
        if differs(table.observation, table.observation, ROWS).mean() <= 0.5:  # they hardly move
            return ""
    elif not (count := continued_rows(table, rows, ~ends.last, ends.broken)):
        return ""
    else:
        rows = rows[: min(table.rows, ROWS) - 1]
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

    A row breaks where its ``next_observation`` is not the following row's observation. A terminated
    row may: its value is never used. Without ``next_observation`` the observation jumps there
    (``motion.Motion.jumps``). Motion that is not smooth, such as a collision, jumps too: so fewer
    than ``FEWEST`` jumps are not reported, and more only if more rows jump inside episodes than at
    their ends, of which less than half jump, or if most of them lead to an observation like the first
    ones of episodes. In a table without any mark all are reported.
    """
    marked, known = any(key in table.columns for key in MARKS), ends.broken is not None
    if ends.broken is not None:
        broken = ends.broken
    elif not ends.valid.all() or (moved := motion(table)) is None:
        return ""
    else:
        broken = moved.jumps
    at_end = ends.last[: len(broken)]
    # Without marks, episodes were cut where rows break.
    inside = ends.valid[: len(broken)] & ~(at_end if marked or not known else ends.terminated[:-1])
    breaks = broken & inside
    count, matching = int(breaks.sum()), int((broken & at_end).sum())
    if known and 2 * count > inside.sum():
        return _unrelated(table, inside, count)
    without_ends = (
        not (ends.last[:-1] | ends.terminated[:-1]).any() and "episode" not in table.columns
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
    path, following = table.paths["next_observation"], table.next_observation or {}
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
    """Whether most of the jumps lead to observations like the first ones of episodes.

    That is: at least 3 of 4 columns lie within the range of those. Where there are no more than
    ``FEWEST`` of them, the range is widened by a quarter of the column's standard deviation.
    """
    values = float_values(table, len(at_end) + 1)
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
