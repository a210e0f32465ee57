"""Exact comparison of next observations with the observations of other rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column
from iql_torchrl.data.schema import Key
from iql_torchrl.tolerance import EQUAL, rounding

#: How many numbers of one column are compared at once, and in how many leading rows the spread of a
#: column is measured.
VALUES, SAMPLE = 2**22, 4096


def differs(
    observed: Mapping[Key, Column], following: Mapping[Key, Column], steps: int, ahead: int = 1
) -> NDArray[np.bool_]:
    """True where ``following`` is not ``observed`` so many rows ``ahead``, in leading ``steps`` rows.

    The norm of the difference is above ``tolerance.EQUAL``, with columns of a standard deviation below
    1 in units of it; entries that differ by rounding only, of the less precise of the two
    columns' types, are equal, and so is NaN, which is reported elsewhere.
    """
    pairs = [(column, following[key]) for key, column in observed.items()]
    steps = max(0, min(steps, pairs[0][0].shape[0] - ahead))
    width = max(int(np.prod(column.shape[1:])) for column, _ in pairs)
    size = max(1, min(65_536, VALUES // max(width, 1)))
    units = [_unit(column) for column, _ in pairs]
    broken = np.zeros(steps, np.bool_)
    for start in range(0, steps, size):
        stop = min(start + size, steps)
        gap = np.zeros(stop - start)
        for (column, successors), unit in zip(pairs, units, strict=True):
            later = np.asarray(column[start + ahead : stop + ahead]).reshape(stop - start, -1)
            after = np.asarray(successors[start:stop]).reshape(stop - start, -1)
            relative = rounding(later.dtype, after.dtype)
            unequal = (later != after).any(axis=1)  # few rows, and the rest is slow
            later, after = (rows[unequal].astype(np.float64) for rows in (later, after))
            with np.errstate(invalid="ignore"):
                difference = np.abs(later - after)
                difference[difference <= relative * np.abs(later)] = 0
                gap[unequal] += np.square(difference / unit).sum(1)
        broken[start:stop] = np.sqrt(np.nan_to_num(gap)) > EQUAL
    return broken


def _unit(column: Column) -> Any:
    """The standard deviation of each column of floats in leading rows, where it is below 1; else 1."""
    if np.dtype(column.dtype).kind != "f":
        return 1.0
    values = np.asarray(column[:SAMPLE], np.float64)
    with np.errstate(invalid="ignore"):
        spread = values.reshape(len(values), -1).std(axis=0)
    return np.where((spread > 0) & (spread < 1), spread, 1.0)


def found_among(observed: Mapping[Key, Column], following: Mapping[Key, Column]) -> float:
    """Share of leading next observations that are the observation of some leading row, bit for bit."""
    sides = []
    for side in (observed, following):
        arrays = [np.asarray(side[key][:SAMPLE]) for key in observed]
        kinds = [np.asarray(observed[key][:1]).dtype for key in observed]
        rows = [x.astype(kind).reshape(len(x), -1) for x, kind in zip(arrays, kinds, strict=True)]
        sides.append(
            [b"".join(parts) for parts in zip(*(map(bytes, x) for x in rows), strict=True)]
        )
    known = set(sides[0])
    return float(np.mean([row in known for row in sides[1]]))
