"""Hints that episode boundaries are wrong, from the distance between consecutive observations.

Hints are warnings and never change what is read. The distance of two rows is the mean over columns of
their difference in units of the column's usual step (the upper quartile of its changes from row to
row), at most ``MOST_UNITS`` per column. It is compared with that of random pairs of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns, Flags, UnreadableColumn
from iql_torchrl.data.readers.columns import IDS
from iql_torchrl.data.schema import Key

Floats = NDArray[np.float64]
#: Most leading rows and numbers of a column that are read, columns and random pairs that are used.
ROWS, VALUES, COLUMNS, PAIRS = 32_768, 2**21, 128, 4096
#: Fewest rows, and fewest ends or jumps, that a hint is about; fewest rows that may be interleaved.
FEWEST_ROWS, FEWEST, FEWEST_INTERLEAVED = 20, 3, 128
#: Most units of a column that count; most environments whose interleaved rows are recognised.
MOST_UNITS, MOST_ENVS = 5.0, 64
#: Columns that often contain done flags, in sources that have no column of our names for them.
POSSIBLE_MARKS = (
    "episode_terminals", "dones", "done", "next/done", "dones_float", "terminals", "timeouts",
    "timeout", "is_last", "episode_ends",
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Distances ``length`` from row t to row t + 1, of the columns ``values`` that change in most rows.

    ``unrelated``, ``spread``: of random pairs of rows, their distance and each column's median.
    ``ended``: row t is the last of its episode; ``inside``: the other rows, or all if these are few.
    ``usual``: the ``rank`` of lengths inside among ``unrelated``: 0.5 if rows are independent.
    """

    values: Floats
    unit: Floats
    length: Floats
    unrelated: Floats
    spread: Floats
    ended: Flags
    inside: Flags
    usual: float


def boundary_hints(
    columns: Columns, terminated: Flags, last: Flags, broken: Flags | None
) -> list[str]:
    """Sentences about episode boundaries that the observations contradict; empty if there are none.

    ``terminated``: rows that terminate; ``last``: rows that end an episode; ``broken``: rows whose next
    observation is not the next row's observation, if known. Where ids end the episodes only autoreset
    is hinted at. There are no hints where consecutive rows are hardly nearer than random pairs, or
    every row terminates, as in a bandit.
    """
    names, ids = columns.paths, bool({*IDS} & columns.paths.keys())
    if terminated.all() and not ids:
        return []
    values = leading_values(columns.leaves("observation"))
    steps = steps_of(values, last[: max(0, len(values) - 1)])
    if steps is None or steps.usual > 0.35:
        return []
    (shift, one_later), ends = _shift(steps), int(steps.ended.sum())
    zero = np.ravel(np.asarray(columns.columns["next/reward"][: len(values)])) == 0
    unrewarded = int(zero[1:][steps.ended].sum())  # the last row of an environment has no reset
    resets = one_later and unrewarded >= 0.9 * ends
    if resets and zero.mean() < 0.5:
        return [
            f"the rows after {unrewarded} of the {ends} ends of episodes have reward 0 and continue "
            "from the end, and then the observation jumps: these rows look like resets of a vector "
            "environment with autoreset, which ignores their action. Pass autoreset=True to drop them."
        ]
    same, terminates = np.ones_like(steps.ended), terminated[: len(steps.ended)]
    if broken is not None:  # A next observation that is not the next row's proves an end.
        same = ~broken[: len(same)]
        if text := _first_of_next(steps, same, terminates):
            return [text]
    if ids:
        return []
    if shift:
        where, move = ("before", "later") if shift == 1 else ("after", "earlier")
        remedy = "; or pass autoreset=True if they are resets of a vector environment" * resets
        return [
            f"the flags of the {ends} ends of episodes are shifted: each lies one row {where} a row "
            f"after which the observation jumps. Set them one row {move}{remedy}."
        ]
    share = 0.75 if broken is None else 0.9
    texts = [
        _continued(steps, steps.ended & terminates, same, "terminated", names),
        _continued(steps, steps.ended & ~terminates, same, "truncated", names, share),
    ]
    if not any(texts) and broken is None:
        texts = [_jumps(steps, len(last), columns.unused)]
    return [text for text in texts if text]


def interleaved_by(observation: Mapping[Key, Column]) -> int | None:
    """Number E of environments whose rows are interleaved (row = t * E + env), or None.

    Rows less than 2 E apart differ as random pairs do, on average over columns, except those E apart:
    the eighth of the columns that differ least differ less than half as much there. Some rows
    2 E ... 16 E apart differ more: otherwise E is a period, such as that of a week.
    """
    values, generator = leading_values(observation), np.random.default_rng(0)
    steps = steps_of(values, np.zeros(max(0, len(values) - 1), np.bool_))
    if (rows := len(values)) < FEWEST_INTERLEAVED or steps is None:
        return None

    def apart(start: NDArray[np.int64], stop: NDArray[np.int64]) -> Floats:
        difference = np.abs(steps.values[stop] - steps.values[start]) / steps.spread
        return np.asarray(np.minimum(difference, MOST_UNITS).mean(axis=0))

    def differ(lag: int) -> tuple[float, float]:
        start = generator.integers(0, rows - lag, 512)
        columns = np.sort(apart(start, start + lag) / unrelated)
        return float(columns.mean()), float(columns[: -(-len(columns) // 8)].mean())

    unrelated = apart(*generator.integers(0, rows, (2, PAIRS)))
    if differ(1)[0] < 0.7:  # as in most data
        return None
    lags = np.array([differ(lag) for lag in range(1, min(2 * MOST_ENVS, rows // 8))])
    envs = int(np.argmax(lags[:MOST_ENVS, 1] < 0.5)) + 1  # 1 if there are none
    others = np.delete(lags[: 2 * envs - 1, 0], envs - 1)
    later = [differ(envs * k)[1] for k in range(2, 17) if envs * k < rows // 2]
    if envs == 1 or min(others) < max(0.7, lags[envs - 1, 0]):
        return None
    return envs if max(later, default=0) > 1.3 * lags[envs - 1, 1] else None


def leading_values(observation: Mapping[Key, Column]) -> Floats:
    """The leading rows of the leading columns of numbers, ``(rows, k)``, without pictures (uint8)."""
    parts: list[Floats] = []
    for column in observation.values():
        kind, width = np.dtype(column.dtype), max(1, int(np.prod(column.shape[1:])))
        if kind.kind in "iuf" and kind != np.uint8:
            values = np.asarray(column[: min(ROWS, max(FEWEST_ROWS + 1, VALUES // width))])
            parts.append(values.reshape(len(values), width)[:, :COLUMNS].astype(np.float64))
    rows = min(map(len, parts), default=0)
    return np.hstack([np.empty((rows, 0)), *(part[:rows] for part in parts)])[:, :COLUMNS]


def steps_of(values: Floats, ended: Flags) -> Steps | None:
    """The steps of the finite columns, or None where rows are few or no column moves."""
    rows = len(values)
    values = values[:, np.isfinite(values).all(axis=0)]
    values = values[:, (values[1:] != values[:-1]).sum(axis=0) > rows / 2]
    if rows <= FEWEST_ROWS:
        return None
    first, second = np.random.default_rng(0).integers(0, rows, (2, PAIRS))
    pairs = np.abs(values[first] - values[second])
    if not (vary := np.median(pairs, axis=0) > 0).any():
        return None
    values, pairs = values[:, vary], pairs[:, vary]
    changes = np.abs(np.diff(values, axis=0))
    inside = ~ended if (~ended).sum() >= FEWEST_ROWS else np.ones(rows - 1, np.bool_)
    unit = np.quantile(changes[inside], 0.75, axis=0)
    unit[unit == 0] = np.inf
    length, unrelated = distance(changes, unit), distance(pairs, unit)
    spread, usual = np.median(pairs, axis=0), rank(length[inside], unrelated)
    return Steps(values, unit, length, unrelated, spread, ended, inside, usual)


def distance(difference: Floats, unit: Floats) -> Floats:
    """Mean over columns of the difference in ``unit``, at most ``MOST_UNITS`` each."""
    return np.asarray(np.minimum(np.abs(difference) / unit, MOST_UNITS).mean(axis=-1))


def rank(lengths: Floats, others: Floats) -> float:
    """Probability that one of ``lengths`` is above one of ``others``; equal ones count a half.

    Of n lengths that are like the others it is 0.5, with the standard deviation ``sqrt(1 / 12 n)``.
    """
    ordered = np.sort(others)
    below = np.searchsorted(ordered, lengths) + np.searchsorted(ordered, lengths, "right")
    return float(below.mean()) / (2 * len(ordered))


def _shift(steps: Steps) -> tuple[int, bool]:
    """1 or -1 where the observation jumps after the rows after or before the ends; else 0.

    And True if it jumps after the rows after the ends: the shift is 1, or nine tenths of those steps
    are longer than that at the end, and than most steps. The median discontinuity is longer than a
    tenth of the random pairs: a controller that accelerates towards its next goal is not a reset.
    """
    ends, inside = np.flatnonzero(steps.ended), steps.length[steps.inside]
    if len(ends) < FEWEST:
        return 0, False
    before, tenth = ends[ends + 1 < len(steps.length)], np.quantile(steps.unrelated, 0.1)
    usual = np.maximum(steps.length[before], np.median(inside))
    one_later = len(before) >= FEWEST and (steps.length[before + 1] > usual).mean() >= 0.9
    one_later = one_later and np.median(steps.length[before + 1]) > tenth
    for shift in (1, -1) if rank(steps.length[ends], inside) <= 0.8 else ():
        rows = (ends + shift)[(ends + shift >= 0) & (ends + shift < len(steps.length))]
        longer = rank(steps.length[rows], inside) >= max(0.85, 0.5 + np.sqrt(0.75 / len(rows)))
        if longer and np.median(steps.length[rows]) > tenth:
            return shift, bool(one_later or shift == 1)
    return 0, bool(one_later)


def _first_of_next(steps: Steps, same: Flags, terminates: Flags) -> str:
    """A sentence if the next observations of most ends are the first ones of the next episodes."""
    ends, found = int(steps.ended.sum()), steps.ended & same
    count = int(found.sum())
    if count < max(FEWEST, ends / 2) or not (found & ~terminates).any():
        return ""
    if rank(steps.length[found], steps.length[steps.inside]) <= 0.8:
        return ""
    return (
        f"next_observation of {count} of the {ends} rows that end episodes is the following row's "
        "observation, to which the observation jumps: a vector environment that resets itself in the "
        "same step returns the first observation of the next episode there, from which truncated "
        "rows bootstrap. Record infos['final_obs'] of those rows as their next observation, or pass "
        "columns={'next_observation': None}, which drops the truncated ones."
    )


def _continued(
    steps: Steps, ended: Flags, same: Flags, key: str, names: Mapping[str, str], share: float = 0.75
) -> str:
    """A sentence if the rows after this ``share`` of the ends continue their episodes.

    Their steps are ordinary, and shorter than the distances from them to the rows after other ends.
    Where the next episode begins independently of the last one, both are alike.
    """
    rows, ordinary = np.flatnonzero(ended), np.quantile(steps.length[steps.inside], [0.9, 0.99])
    count = int((same[rows] & (steps.length[rows] <= min(2 * ordinary[0], ordinary[1]))).sum())
    if count < max(FEWEST, share * len(rows)):
        return ""
    some = rows[:: -(-len(rows) // 64)]
    starts = distance(steps.values[some, None] - steps.values[some + 1], steps.unit)
    own = np.mean([rank(row[[n]], np.delete(row, n)) for n, row in enumerate(starts)])
    if own > min((steps.usual + 0.5) / 2, 0.5 - np.sqrt(0.75 / len(some))):
        return ""
    keys = ("terminated", "not_terminated") if key == "terminated" else (key, "trajectory_end")
    path = next((names[k] for k in keys if k in names), "max_episode_steps")
    remedy = f"{path!r} may be wrong; if recording was cut there on purpose, ignore this warning."
    if key == "terminated":
        remedy = (
            f"If {path!r} only flags where recording was cut, pass columns={{'terminated': None, "
            f"'truncated': {path!r}}}; if it is 0 where a row terminates, columns={{'not_terminated': "
            f"{path!r}}}; if episodes do continue there, name their ids: columns={{'episode': ...}}."
        )
    return (
        f"{count} of the {len(rows)} rows flagged {key} ({path!r}) are followed by a row that "
        f"continues the same episode. {remedy}"
    )


def _jumps(steps: Steps, rows: int, unused: Mapping[str, Column]) -> str:
    """A sentence if the observation jumps inside episodes as it does at their ends.

    A jump is longer than a tenth of the random pairs, and than the longest of so many steps with an
    exponential tail, which must be shorter than a third of the pairs. Fewer than half of the columns
    stay in place, as they do in a collision. Rows after an end are left out: first steps often are
    long. A third of the ends must jump, and a quarter as many rows inside.
    """
    middle, high = np.quantile(steps.length[steps.inside], [0.5, 0.9])
    longest = high + (high - middle) * np.log(len(steps.length) / 10) / np.log(5)
    tenth, most = np.quantile(steps.unrelated, [0.1, 2 / 3])
    stays = np.abs(np.diff(steps.values, axis=0)) < 0.2 * steps.spread
    jumps = (steps.length > max(longest, tenth)) & (stays.mean(axis=1) < 0.5)
    ends, at_ends = int(steps.ended.sum()), int((jumps & steps.ended).sum())
    jumps &= ~(steps.ended | np.append(False, steps.ended[:-1]))
    if longest > most or 3 * at_ends < ends or jumps.sum() < max(FEWEST, at_ends / 4):
        return ""
    why = "done flags are missing there" if ends else f"all {rows:,} rows were read as one episode"
    text = (
        f"the observation jumps in {jumps.sum()} rows inside episodes (of {len(steps.values):,} looked "
        f"at), first at row {int(jumps.argmax())}: {why}. Flag them as truncated or terminated, or "
        "name a column of flags or ids: columns={'truncated': ...} or columns={'episode': ...}."
    )
    for name, column in unused.items():
        if name in POSSIBLE_MARKS and not isinstance(column, UnreadableColumn):
            flags = np.asarray(column[:])
            if flags.size == rows and np.isin(flags, [0, 1]).all() and 0 < flags.mean() < 0.5:
                return f"{text} {name!r} looks like done flags: columns={{'truncated': {name!r}}}."
    return text
