"""Tables of Arrow columns: one row a step, or one row an episode whose columns hold sequences."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, PartsColumn, UnreadableColumn, row_range
from iql_torchrl.data.readers.arrow_values import (
    descend,
    is_list,
    leaves,
    numbers,
    one_array,
    value_dtype,
)
from iql_torchrl.data.readers.columns import NAMES
from iql_torchrl.data.schema import DatasetError

__all__ = ["ArrowRows", "arrow_columns"]

#: About how many bytes of whole episodes are converted together.
PART_BYTES = 16 * 2**20
#: Rows of a table of episodes that are looked at together to measure them.
EPISODES = 256


class ArrowRows(Protocol):
    """Rows that are read by column and range, such as a Parquet file's."""

    name: str
    rows: int
    schema: Any
    folder: Path | None

    def read(self, column: str, start: int, stop: int) -> Any:
        """The column's rows ``start`` to ``stop - 1`` as an Arrow array or chunked array."""
        ...


def arrow_columns(table: ArrowRows, mapping: Mapping[str, str | None]) -> dict[str, Column]:
    """The columns of ``table``, one row a step; nothing but lengths of lists is read yet.

    Fields of structs and names with dots become groups: ``observation.state`` is the leaf ``state``
    of ``observation``. Where the rewards (by their usual names, or what ``mapping`` names) are lists
    of other lengths than 1, a row of the table is an episode: then each list is a sequence in time,
    ``episode`` numbers the rows, a single boolean of an episode marks its last step, and other single
    values are left out. Observations and masks may be one longer than the rewards: then the last one
    is the observation after the last step, and ``next_observation`` (``next_action_mask``) is added.

    Raises ``DatasetError`` for a table without rows. The first use of a column raises it, naming the
    column and the row, where sequences of one episode have other lengths.
    """
    if not table.rows:
        raise DatasetError(f"{table.name}: has no rows; expected at least one.")
    steps = _episode_lengths(table, mapping)
    columns: dict[str, Column] = {}
    for field in table.schema:
        for path in leaves(field.type):
            name = "/".join((field.name.replace(".", "/"), *path))
            if steps is None:
                columns[name] = _StepColumn(table, field, path)
            else:
                columns.update(_episode_columns(table, field, path, name, steps, mapping))
    if steps is not None:
        columns["episode"] = np.repeat(np.arange(len(steps)), steps)
    return columns


def _episode_lengths(
    table: ArrowRows, mapping: Mapping[str, str | None]
) -> NDArray[np.int64] | None:
    """Steps of each row that is an episode, None where a row is a step."""
    names = [mapping["reward"]] if mapping.get("reward") else NAMES["reward"]
    for field in table.schema:
        if field.name.replace(".", "/") in [str(name).replace(".", "/") for name in names]:
            sizes = _list_sizes(table, field, ())
            return None if sizes is None or bool((sizes == 1).all()) else sizes
    return None


def _list_sizes(table: ArrowRows, field: Any, path: tuple[str, ...]) -> NDArray[np.int64] | None:
    """Lengths of a column's lists; None for a column of single values, empty rows as length 0."""
    import pyarrow.compute as pc

    parts = []
    for start in range(0, table.rows, EPISODES):
        stop = min(start + EPISODES, table.rows)
        array = descend(one_array(table.read(field.name, start, stop)), path)
        if not is_list(array.type):
            return None
        sizes = pc.fill_null(pc.list_value_length(array), 0)
        parts.append(sizes.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(parts)


def _episode_columns(
    table: ArrowRows, field: Any, path: tuple[str, ...], name: str, steps: NDArray[np.int64],
    mapping: Mapping[str, str | None],
) -> dict[str, Column]:  # fmt: skip
    """The columns of steps of one column of episodes."""
    sizes = _list_sizes(table, field, path)
    if sizes is None:
        if value_dtype(field.type, path).kind != "b":
            return {}
        marks = np.zeros(int(steps.sum()), np.bool_)
        values = numbers(descend(one_array(table.read(field.name, 0, table.rows)), path), name)
        marks[np.cumsum(steps)[steps > 0] - 1] = values[steps > 0]
        return {name: marks}
    following = _following_name(name, mapping)
    more = 1 if following and np.array_equal(sizes, steps + 1) else 0
    if len(wrong := np.flatnonzero(sizes != steps + more)):
        reason = (
            f"{table.name}: {name} has {sizes[wrong[0]]} steps in the episode of row {wrong[0]}, whose "
            f"reward has {steps[wrong[0]]}; expected one entry per step"
            f"{', or one more in every episode' if following else ''}."
        )
        return {name: UnreadableColumn(reason)}
    columns: dict[str, Column] = {name: _sequence(table, field, path, steps, (0, more))}
    if more and following:
        columns[following] = _sequence(table, field, path, steps, (more, 0))
    return columns


def _following_name(name: str, mapping: Mapping[str, str | None]) -> str | None:
    """The name of the column of successors, for observations and masks."""
    for key in ("observation", "action_mask"):
        known = [str(mapping[key]).replace(".", "/")] if mapping.get(key) else NAMES[key]
        for path in known:
            if name == path or name.startswith(f"{path}/"):
                return str(mapping.get(f"next_{key}") or f"next_{key}") + name[len(path) :]
    return None


class _StepColumn:
    """A column of a table of steps; only the rows that are asked for are converted."""

    def __init__(self, table: ArrowRows, field: Any, path: tuple[str, ...]) -> None:
        self._table, self._field, self._path = table, field, path
        self._row_shape: tuple[int, ...] | None = None
        self.dtype = value_dtype(field.type, path)

    @property
    def shape(self) -> tuple[int, ...]:
        if self._row_shape is None:
            known = self.dtype.kind in "biuf"
            self._row_shape = self._values(0, 1).shape[1:] if known else ()
        return (self._table.rows, *self._row_shape)

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        start, stop = row_range(rows, self._table.rows)
        if start == stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        values = self._values(start, stop)
        if values.shape[1:] != self.shape[1:]:
            raise DatasetError(
                f"{self._name} has rows of shape {values.shape[1:]} from row {start} on, and of "
                f"{self.shape[1:]} before; expected one shape."
            )
        return values

    @property
    def _name(self) -> str:
        return f"{self._table.name}: {'.'.join((self._field.name, *self._path))}"

    def _values(self, start: int, stop: int) -> NDArray[Any]:
        array = descend(one_array(self._table.read(self._field.name, start, stop)), self._path)
        return numbers(array, self._name, folder=self._table.folder, first=start)


def _sequence(
    table: ArrowRows, field: Any, path: tuple[str, ...], steps: NDArray[np.int64],
    cut: tuple[int, int],
) -> Column:  # fmt: skip
    """The steps of all episodes of a column, without ``cut`` entries at the start and end of each."""
    name = f"{table.name}: {'.'.join((field.name, *path))}"
    stored = steps + sum(cut)
    ends = np.concatenate([[0], np.cumsum(stored)])

    def read(start: int, stop: int) -> NDArray[Any]:
        """Whole episodes."""
        array = descend(one_array(table.read(field.name, start, stop)), path)
        values = numbers(array.flatten(), name, folder=table.folder, first=int(ends[start]))
        if not any(cut):
            return values
        sizes = stored[start:stop]
        place = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept = (place >= cut[0]) & (place < np.repeat(sizes, sizes) - cut[1])
        return values[kept]

    dtype = value_dtype(field.type, path)
    row_shape: tuple[int, ...] = ()
    if dtype.kind in "biuf" and steps.any():
        first = int(np.flatnonzero(steps)[0])
        try:
            row_shape = read(first, first + 1).shape[1:]
        except DatasetError as error:  # only an error if the column is used
            return UnreadableColumn(str(error))
    groups = _groups(steps, max(1, PART_BYTES // (int(np.prod(row_shape)) * dtype.itemsize or 1)))
    lengths = [int(steps[a:b].sum()) for a, b in pairwise(groups)]
    return PartsColumn(lengths, lambda n: read(groups[n], groups[n + 1]), row_shape, dtype)


def _groups(steps: NDArray[np.int64], limit: int) -> list[int]:
    """First rows of groups of episodes of ``limit`` steps at most (or one episode), and the end."""
    bounds, total = [0], 0
    for row, length in enumerate(steps):
        if total and total + length > limit:
            bounds.append(row)
            total = 0
        total += int(length)
    return [*bounds, len(steps)]
