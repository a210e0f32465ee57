"""How the observations of a table move: which row follows which, and where they jump."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column
from iql_torchrl.data.schema import Key

CHUNK = 65_536
#: Observations whose difference has at most this norm are equal.
TOLERANCE = 1e-6
#: How many numbers of one column ``differs`` compares at once.
VALUES = 2**22
#: Rows and columns that ``motion_of`` reads at most: the leading ones.
ROWS, COLUMNS = 32_768, 128
#: Smallest number of steps for which ``motion_of`` gives a result.
STEPS = 20
ROUNDS = 4


def differs(
    observed: Mapping[Key, Column], following: Mapping[Key, Column], steps: int, ahead: int = 1
) -> NDArray[np.bool_]:
    """Where ``following`` is not ``observed`` so many rows ``ahead``, in the leading ``steps`` rows.

    The norm of the difference is above ``TOLERANCE``; entries that differ by no more than 4 units of
    rounding, of the less precise of the two columns' types, count as equal, and so does NaN, which
    ``BlockChecker`` reports.
    """
    pairs = [(column, following[key]) for key, column in observed.items()]
    steps = max(0, min(steps, pairs[0][0].shape[0] - ahead))
    width = max(int(np.prod(column.shape[1:])) for column, _ in pairs)
    chunk = max(1, min(CHUNK, VALUES // max(width, 1)))
    broken = np.zeros(steps, np.bool_)
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        gap = np.zeros(stop - start)
        for column, successors in pairs:
            later = np.asarray(column[start + ahead : stop + ahead])
            after = np.asarray(successors[start:stop])
            kinds = [values.dtype for values in (later, after) if values.dtype.kind == "f"]
            rounding = 4 * max((float(np.finfo(kind).eps) for kind in kinds), default=0.0)
            later, after = later.astype(np.float64), after.astype(np.float64)
            with np.errstate(invalid="ignore"):
                difference = np.abs(later - after)
                difference[difference <= rounding * np.abs(later)] = 0
                gap += np.square(difference).reshape(stop - start, -1).sum(1)
        broken[start:stop] = np.sqrt(np.nan_to_num(gap)) > TOLERANCE
    return broken


@dataclass(frozen=True)
class Motion:
    """How well a linear model predicts each row's observation from the row before it.

    ``error``: of the step from row t to row t + 1, ``(rows - 1,)``. ``jumps``: steps that are no
    continued motion. ``unrelated``: error that 90 % of pairs of unrelated rows exceed.
    """

    error: NDArray[np.float64]
    jumps: NDArray[np.bool_]
    unrelated: float


def float_values(observation: Mapping[Key, Column], rows: int) -> NDArray[np.float64]:
    """The leading float columns of the leading rows, ``(rows, k)``."""
    parts = [
        np.asarray(column[:rows], np.float64).reshape(rows, -1)[:, :COLUMNS]
        for column in observation.values()
        if np.dtype(column.dtype).kind == "f"
    ]
    return np.concatenate([np.empty((rows, 0)), *parts], axis=1)[:, :COLUMNS]


def motion_of(observation: Mapping[Key, Column], action: Column) -> Motion | None:
    """The motion of a table's leading ``ROWS`` rows, in its leading ``COLUMNS`` columns.

    Measured: each float column of the observation, divided by its standard deviation, is predicted
    one row ahead by least squares from the observation and the action of the row before (from a
    constant alone where there are fewer than 10 steps per input). The fit is repeated on the 80 %
    best predicted steps, so that jumps do not affect it. The error of a step is the root mean square
    over columns of its residual, each column's in units of the 90 % quantile of its own residuals.
    Columns that stay equal in half of the steps or more are left out.

    A step is a jump if its error exceeds both 4 times the 80 % quantile of all errors and half the
    median error of pairs of unrelated rows, and the residual exceeds 2 units in more than a third
    of the columns (a collision changes few columns at once); or if it exceeds 20 units in more
    than half of the columns.

    None where this cannot be decided: fewer than ``STEPS`` steps, no moving float column, or numbers
    that are not finite.
    """
    rows = min(action.shape[0], ROWS)
    if rows <= STEPS:
        return None
    observed = float_values(observation, rows)
    actions = np.asarray(action[:rows], np.float64).reshape(rows, -1)[:, :COLUMNS]
    if not (np.isfinite(observed).all() and np.isfinite(actions).all()):
        return None
    observed = observed[:, (np.diff(observed, axis=0) != 0).mean(axis=0) > 0.5]
    if not observed.shape[1]:
        return None
    observed, actions = _standard(observed), _standard(actions[:, actions.std(axis=0) > 0])
    inputs = np.column_stack([observed[:-1], actions[:-1], np.ones(rows - 1)])
    if rows - 1 < 10 * inputs.shape[1]:
        inputs = inputs[:, -1:]
    change, well_predicted = np.diff(observed, axis=0), np.ones(rows - 1, np.bool_)
    for _ in range(ROUNDS):
        best = inputs[well_predicted]
        square = best.T @ best
        square[np.diag_indices_from(square)] += 1e-8 * len(best)
        predicted = inputs @ np.linalg.solve(square, best.T @ change[well_predicted])
        residual = np.abs(change - predicted)
        # Changes below 1e-4 standard deviations may be rounding; they do not count as motion.
        unit = np.maximum(np.quantile(residual[well_predicted], 0.9, axis=0), 1e-4)
        error = _root_mean_square(residual / unit)
        ordinary = float(np.quantile(error, 0.8))
        well_predicted = error <= ordinary
    shuffled = np.random.default_rng(0).permutation(rows - 1)
    unrelated = _root_mean_square((observed[1:][shuffled] - observed[:-1] - predicted) / unit)
    far = error > max(4 * ordinary, 0.5 * float(np.median(unrelated)))
    far &= (residual > 2 * unit).mean(axis=1) > 1 / 3
    everywhere = (residual > 20 * unit).mean(axis=1) > 0.5
    return Motion(error, far | everywhere, float(np.quantile(unrelated, 0.1)))


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(scale > 0, scale, 1.0))


def _root_mean_square(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(np.square(values).mean(axis=1)))
