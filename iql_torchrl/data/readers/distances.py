"""Distances between the observations of rows: consecutive ones, random pairs, rows further apart.

The distance of two rows is the mean over columns of their difference in units of the column's usual
step (the upper quartile of its changes from row to row), at most ``MOST_UNITS`` per column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns
from iql_torchrl.data.schema import DatasetError, Key
from iql_torchrl.tolerance import EQUAL, rounding

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
#: Most leading rows and numbers of a column that are read, columns and random pairs that are used.
ROWS, VALUES, COLUMNS, PAIRS = 32_768, 2**21, 128, 4096
#: Fewest rows with a usual step; fewest rows that may be interleaved.
FEWEST_ROWS, FEWEST_INTERLEAVED = 20, 128
#: Most units of a column that count; most environments whose interleaved rows are recognised.
MOST_UNITS, MOST_ENVS = 5.0, 64


def differs(
    observed: Mapping[Key, Column], following: Mapping[Key, Column], steps: int, ahead: int = 1
) -> Flags:
    """True where ``following`` is not ``observed`` so many rows ``ahead``, in leading ``steps`` rows.

    The norm of the difference is above ``tolerance.EQUAL``; columns of a standard deviation below 1
    are divided by their standard deviation. Entries that differ by rounding of the less precise dtype
    are equal, and so is NaN, which is reported elsewhere.
    """
    with np.errstate(invalid="ignore"):
        leading = [np.asarray(column[:PAIRS], np.float64) for column in observed.values()]
        units = [rows.reshape(len(rows), -1).std(axis=0) for rows in leading]
    size = max(1, min(65_536, VALUES // max(map(len, units))))
    gap = np.zeros(max(0, min(steps, next(iter(observed.values())).shape[0] - ahead)))
    # columns of one chunk often lie in the same part of a file
    for start in range(0, len(gap), size):
        stop = min(start + size, len(gap))
        for (key, column), unit in zip(observed.items(), units, strict=True):
            later = np.asarray(column[start + ahead : stop + ahead]).reshape(stop - start, -1)
            after = np.asarray(following[key][start:stop]).reshape(stop - start, -1)
            relative = rounding(later.dtype, after.dtype)
            unequal = (later != after).any(axis=1)  # few rows, and the rest is slow
            later, after = (part[unequal].astype(np.float64) for part in (later, after))
            with np.errstate(invalid="ignore"):
                difference = np.abs(later - after)
                difference[difference <= relative * np.abs(later)] = 0
                difference /= np.where((unit > 0) & (unit < 1), unit, 1)
                gap[start:stop][unequal] += np.square(difference).sum(1)
    return np.asarray(np.sqrt(np.nan_to_num(gap)) > EQUAL)


@dataclass(frozen=True)
class Steps:
    """Distances ``length`` from row t to row t + 1, of the columns ``values`` that change in most rows.

    ``unrelated``: distances of random pairs of rows. ``ended``: row t is the last of its episode;
    ``inside``: lengths in the other rows, or in all if these are few.
    """

    values: Floats
    unit: Floats
    length: Floats
    unrelated: Floats
    ended: Flags
    inside: Floats

    def longer_at(self, shift: int) -> bool:
        """True if nine tenths of the steps ``shift`` rows after the ends are longer than at the ends.

        They are also longer than most steps inside episodes, and at least three.
        """
        ends = np.flatnonzero(self.ended)
        rows = ends[(ends + shift >= 0) & (ends + shift < len(self.length))]
        usual = np.maximum(self.length[rows], np.median(self.inside))
        return len(rows) >= 3 and bool((self.length[rows + shift] > usual).mean() >= 0.9)


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
    length = distance(changes, unit)
    return Steps(values, unit, length, distance(pairs, unit), ended, length[inside])


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


def distance(difference: Floats, unit: Floats) -> Floats:
    """Mean over columns of the difference in ``unit``, at most ``MOST_UNITS`` each."""
    return np.asarray(np.minimum(np.abs(difference) / unit, MOST_UNITS).mean(axis=-1))


def rank(lengths: Floats, others: Floats) -> float:
    """Probability that one of ``lengths`` is above one of ``others``; equal ones count a half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, lengths) + np.searchsorted(ordered, lengths, "right")
    return float(below.mean()) / (2 * len(ordered))


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

    def differ(lag: int) -> tuple[float, float]:
        start = generator.integers(0, rows - lag, 512)
        gaps = np.abs(steps.values[start + lag] - steps.values[start]) / steps.unit
        columns = np.sort(np.minimum(gaps, MOST_UNITS).mean(axis=0) / unrelated)
        return float(columns.mean()), float(columns[: -(-len(columns) // 8)].mean())

    first, second = steps.values[generator.integers(0, rows, (2, PAIRS))]
    unrelated = np.minimum(np.abs(first - second) / steps.unit, MOST_UNITS).mean(axis=0)
    if differ(1)[0] < 0.7:  # as in most data
        return None
    lags = np.array([differ(lag) for lag in range(1, min(2 * MOST_ENVS, rows // 8))])
    envs = int(np.argmax(lags[:MOST_ENVS, 1] < 0.5)) + 1  # 1 if there are none
    others = np.delete(lags[: 2 * envs - 1, 0], envs - 1)
    later = [differ(envs * k)[1] for k in range(2, 17) if envs * k < rows // 2]
    if envs == 1 or min(others) < max(0.7, lags[envs - 1, 0]):
        return None
    return envs if max(later, default=0) > 1.3 * lags[envs - 1, 1] else None


def refuse_interleaved(columns: Columns) -> None:
    """Raise where the rows of several environments take turns, and no ids say so.

    The observations say how many environments may take turns; next observations, if known, must agree.
    """
    observed, following = columns.leaves("observation"), columns.leaves("next/observation")
    envs = interleaved_by(observed)
    if envs is None or (following and differs(observed, following, PAIRS, envs).mean() > 0.5):
        return
    raise DatasetError(
        f"{columns.name}: the rows of {envs} environments are interleaved (row = t * {envs} + env): "
        f"the observation {envs} rows ahead is much nearer than the next one. Add a column that "
        f"numbers the environments, numpy.arange(rows) % {envs}, and pass columns={{'env_index': "
        "...}: rows are then sorted by it. If all rows are of one environment, pass "
        "columns={'env_index': None}."
    )
