"""How far two estimators put the same things in the same order."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["kendall", "ranks", "spearman"]

FloatArray = NDArray[np.float64]


def ranks(values: ArrayLike) -> FloatArray:
    """1 for the smallest of ``(n,)``; equal values share the mean of their ranks."""
    array = np.asarray(values, np.float64)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    result: FloatArray = below + (equal + 1) / 2
    return result


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Pearson's correlation of the ranks, in [-1, 1] (Spearman 1904).

    NaN where an entry is, for fewer than two entries, or where all of one side are equal.
    """
    first, second = _pair(one, other)
    if not _comparable(first, second):
        return math.nan
    first, second = ranks(first), ranks(second)
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / math.sqrt((first @ first) * (second @ second)))


def kendall(one: ArrayLike, other: ArrayLike) -> float:
    """tau-b: concordant less discordant pairs, over pairs untied on either side (Kendall 1945).

    In [-1, 1]; NaN as :func:`spearman`.
    """
    first, second = _pair(one, other)
    if not _comparable(first, second):
        return math.nan
    above = np.triu_indices(len(first), 1)
    signs = [np.sign(side[:, None] - side[None, :])[above] for side in (first, second)]
    untied = math.prod(float(np.abs(sign).sum()) for sign in signs)
    return float((signs[0] * signs[1]).sum() / math.sqrt(untied))


def _pair(one: ArrayLike, other: ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"the two sides have shapes {first.shape} and {second.shape}; wanted (n,) twice."
        )
    return first, second


def _comparable(first: FloatArray, second: FloatArray) -> bool:
    if len(first) < 2 or np.isnan(first).any() or np.isnan(second).any():
        return False
    return bool(np.ptp(first) > 0 and np.ptp(second) > 0)
