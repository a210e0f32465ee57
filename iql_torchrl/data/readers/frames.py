"""Tables in memory: DataFrames of pandas and polars, tables of pyarrow, relations of DuckDB."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns, UnreadableColumn, array_of, package
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line


def is_frame(source: Any) -> bool:
    """Return True for a DataFrame of pandas or polars, and for what has ``__arrow_c_stream__``."""
    return _is_pandas(source) or _is_lazy(source) or hasattr(source, "__arrow_c_stream__")


def _is_lazy(source: Any) -> bool:
    return isinstance(source, getattr(sys.modules.get("polars"), "LazyFrame", ()))


def _is_pandas(source: Any) -> bool:
    return isinstance(source, getattr(sys.modules.get("pandas"), "DataFrame", ()))


def open_frame(source: Any, mapping: Mapping[str, str | None]) -> Columns:
    """The columns of a table in memory, as ``readers.arrow`` reads them.

    The index of a DataFrame is read if it has a name. Cells that hold arrays of one shape become an
    array with a row for each. Without pyarrow, a DataFrame of pandas is read by NumPy: then its rows
    are steps, not episodes. Raises ``DatasetError`` for another kind of object.
    """
    name = type(source).__name__
    if _is_pandas(source):
        series = _series(source)
        if find_spec("pyarrow") is None:
            return Columns(name, {key: _array(values, key) for key, values in series.items()})
        return open_cells(name, series, mapping)
    pa = package("pyarrow", name)
    try:
        table = pa.table(source.collect() if _is_lazy(source) else source)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DatasetError(
            f"{name}: is not a table ({one_line(error)}); expected a DataFrame, a pyarrow.Table, or "
            "another table with one column for each of our keys."
        ) from error
    return open_table(name, table, mapping)


def open_table(
    name: str, table: Any, mapping: Mapping[str, str | None],
    unreadable: Mapping[str, str] | None = None,
) -> Columns:  # fmt: skip
    """The columns of a ``pyarrow.Table``; ``unreadable`` columns are not in it, for that reason."""
    from iql_torchrl.data.readers.arrow import arrow_columns, table_rows

    return Columns(name, arrow_columns(table_rows(name, table, unreadable), mapping))


def open_cells(
    name: str, columns: Mapping[str, Iterable[Any]], mapping: Mapping[str, str | None]
) -> Columns:
    """The columns of Python objects, or of pandas; those that Arrow has no type for are unreadable."""
    pa = package("pyarrow", name)
    arrays, unreadable = {}, {}
    for key, cells in columns.items():
        try:
            try:
                arrays[key] = pa.array(cells)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                arrays[key] = _lists_of_arrays(list(cells))
        except (pa.ArrowException, TypeError, ValueError, OverflowError, IndexError) as error:
            unreadable[key] = (
                f"{name}: {key} cannot be read ({one_line(error)}); expected numbers, booleans or "
                "text, or arrays of one shape, in every row."
            )
    return open_table(name, pa.table(arrays), mapping, unreadable)


def _lists_of_arrays(cells: list[Any]) -> Any:
    """An Arrow array of cells that hold arrays of several dimensions, or nothing (None, NaN)."""
    import pyarrow as pa

    known = np.array([isinstance(cell, np.ndarray | list | tuple) for cell in cells])
    present = [np.asarray(cell) for cell, there in zip(cells, known, strict=True) if there]
    others = [cell for cell, there in zip(cells, known, strict=True) if not there]
    if not present or any(cell is not None and cell == cell for cell in others):
        raise ValueError("values of several kinds")
    joined = np.concatenate(present)
    values = pa.array(joined.reshape(-1))
    for size in reversed(joined.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    lengths = np.zeros(len(cells), np.int64)
    lengths[known] = [len(each) for each in present]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~known))


def _series(frame: Any) -> dict[str, Any]:
    """The columns of a DataFrame by name; levels of names are joined by ``/``."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index(allow_duplicates=True)
    names = ["/".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in frame.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(
            f"DataFrame: the column {twice[0]!r} occurs twice; remove or rename one of them."
        )
    return {name: frame.iloc[:, place] for place, name in enumerate(names)}


def _array(series: Any, name: str) -> Column:
    """A column of pandas as an array; times in seconds, arrays of one shape stacked."""
    values: NDArray[Any] = series.to_numpy()
    if getattr(series.dtype, "kind", "") in "mM":  # also with a time zone: UTC
        units = series.to_numpy(f"{series.dtype.kind}8[us]")
        return np.where(np.isnat(units), np.nan, units.astype(np.int64) / 1e6)
    known = np.array([isinstance(value, np.ndarray | list | tuple) for value in values], np.bool_)
    if values.dtype != object or not known.any():
        return array_of(values, name)
    try:
        stacked = np.stack(list(values[known]))
    except (ValueError, TypeError) as error:
        return UnreadableColumn(
            f"DataFrame: {name} has cells of several shapes ({one_line(error)})."
        )
    if known.all():
        return stacked
    filled = np.full((len(values), *stacked.shape[1:]), np.nan, np.result_type(stacked, np.float32))
    filled[known] = stacked
    return filled
