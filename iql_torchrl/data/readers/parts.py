"""Columns that are stored in parts, such as one array for each episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column
from iql_torchrl.data.schema import DatasetError

__all__ = ["PartsColumn", "UnreadableColumn", "chosen_rows", "row_range"]

#: Rows of a part of ``chosen_rows``.
PART = 4096


class PartsColumn:
    """A column whose rows lie in consecutive parts; only the parts that are asked for are read.

    Args:
        lengths: rows of each part; 0 is allowed.
        read: returns all rows of the part with a number, ``(length, *row_shape)``. It raises
            ``DatasetError`` where the part has another number of rows than ``lengths`` says.
        row_shape: shape of one row.
        dtype: of the values; parts of another dtype are an error of the caller.

    The part read last is kept, because successive slices often end and begin in one part.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        read: Callable[[int], NDArray[Any]],
        row_shape: tuple[int, ...],
        dtype: Any,
    ) -> None:
        self._ends = np.cumsum(np.asarray(lengths, np.int64))
        self._read, self._kept = read, (-1, np.empty(0))
        rows = int(self._ends[-1]) if len(self._ends) else 0
        self.shape, self.dtype = (rows, *row_shape), np.dtype(dtype)

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        start, stop = row_range(rows, self.shape[0])
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        if start == stop:
            return values
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop - 1, side="right"))
        for number in range(first, last + 1):
            begin = int(self._ends[number - 1]) if number else 0
            low, high = max(start, begin), min(stop, int(self._ends[number]))
            if low < high:
                values[low - start : high - start] = self._part(number)[low - begin : high - begin]
        return values

    def _part(self, number: int) -> NDArray[Any]:
        if self._kept[0] != number:
            self._kept = (number, self._read(number))
        return self._kept[1]


class UnreadableColumn:
    """A column that cannot be read: its first use raises ``DatasetError`` with ``reason``."""

    dtype = np.dtype(np.object_)

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def shape(self) -> tuple[int, ...]:
        raise DatasetError(self._reason)

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        raise DatasetError(self._reason)


def chosen_rows(columns: Mapping[str, Column], keep: NDArray[np.bool_]) -> dict[str, Column]:
    """The columns without the rows where ``keep`` is False; their values are not copied."""
    rows = np.flatnonzero(keep)
    lengths = [len(rows[start : start + PART]) for start in range(0, len(rows), PART)]

    def part(column: Column, number: int) -> NDArray[Any]:
        chosen = rows[number * PART : (number + 1) * PART]
        start = int(chosen[0])
        picked: NDArray[Any] = np.asarray(column[start : int(chosen[-1]) + 1])[chosen - start]
        return picked

    return {
        name: column
        if isinstance(column, UnreadableColumn)
        else PartsColumn(lengths, partial(part, column), tuple(column.shape[1:]), column.dtype)
        for name, column in columns.items()
    }


def row_range(rows: slice, count: int) -> tuple[int, int]:
    """Start and stop of a slice of ``count`` rows, of step 1; an empty range where stop < start."""
    start, stop, step = rows.indices(count)
    if step != 1:
        raise ValueError(f"a column is sliced by consecutive rows, not in steps of {step}")
    return start, max(start, stop)
