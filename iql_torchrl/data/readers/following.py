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


def side_by_side(columns: Mapping[Key, Column], rows: int, dtype: Any = np.float64) -> NDArray[Any]:
    """The leading ``rows`` of all columns, flattened: ``(rows, numbers)``."""
    parts = [np.asarray(column[:rows], dtype) for column in columns.values()]
    return np.hstack([part.reshape(len(part), -1) for part in parts])


def differs(
    observed: Mapping[Key, Column], following: Mapping[Key, Column], steps: int, ahead: int = 1
) -> NDArray[np.bool_]:
    """True where ``following`` is not ``observed`` so many rows ``ahead``, in leading ``steps`` rows.

    The norm of the difference is above ``tolerance.EQUAL``, with columns of a standard deviation below
    1 in units of it; entries that differ by rounding only, of the less precise of the two
    columns' types, are equal, and so is NaN, which is reported elsewhere.
    """
    with np.errstate(invalid="ignore"):
        units = [side_by_side({(): column}, SAMPLE).std(axis=0) for column in observed.values()]
    size = max(1, min(65_536, VALUES // max(map(len, units))))
    gap = np.zeros(max(0, min(steps, next(iter(observed.values())).shape[0] - ahead)))
    for start in range(
        0, len(gap), size
    ):  # columns of one chunk often lie in the same part of a file
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


def found_among(observed: Mapping[Key, Column], following: Mapping[Key, Column]) -> float:
    """Share of leading next observations that are, in float32, the observation of a leading row."""
    sides = {key: following[key] for key in observed}
    known = set(map(bytes, side_by_side(observed, SAMPLE, np.float32)))
    return float(np.mean([bytes(row) in known for row in side_by_side(sides, SAMPLE, np.float32)]))
