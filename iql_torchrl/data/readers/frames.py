"""Tables of pandas, polars, pyarrow and DuckDB in memory; tables of Hugging Face's ``datasets``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    UnreadableColumn,
    array_of,
    package,
    reading,
)
from iql_torchrl.data.readers.columns import NAMES
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line


def is_frame(source: Any) -> bool:
    """Return True for a DataFrame of pandas or polars, and for what has ``__arrow_c_stream__``."""
    known = _is(source, "pandas", "DataFrame") or _is(source, "polars", "LazyFrame")
    return known or hasattr(source, "__arrow_c_stream__")


def is_table_of_datasets(source: Any) -> bool:
    """True if ``source`` is an object of ``datasets``."""
    kinds = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return _is(source, "datasets", *kinds)


def _is(source: Any, package: str, *kinds: str) -> bool:
    """True for an object of one of these classes of a package, which is not imported."""
    module = sys.modules.get(package)
    return isinstance(source, tuple(getattr(module, kind, ()) for kind in kinds))


def open_frame(source: Any, mapping: Mapping[str, str | None]) -> Columns:
    """The columns of a table in memory, as ``readers.arrow`` reads them.

    The index of a DataFrame is read if it has a name. Cells that hold arrays of one shape become an
    array with a row for each. Without pyarrow, a DataFrame of pandas is read by NumPy: then its rows
    are steps, not episodes. Raises ``DatasetError`` for another kind of object.
    """
    name = type(source).__name__
    if _is(source, "pandas", "DataFrame"):
        series = _series(source)
        if find_spec("pyarrow") is None:
            return Columns(name, {key: _array(values, key) for key, values in series.items()})
        return open_cells(name, series, mapping)
    pa = package("pyarrow", name)
    remedy = "expected a DataFrame, a pyarrow.Table, or another table with columns for our keys"
    with reading(name, "is not a table", pa.ArrowException, TypeError, ValueError, remedy=remedy):
        table = pa.table(source.collect() if _is(source, "polars", "LazyFrame") else source)
    return open_table(name, table, mapping)


def open_table(
    name: str, table: Any, mapping: Mapping[str, str | None],
    unreadable: Mapping[str, str] | None = None,
) -> Columns:  # fmt: skip
    """The columns of a ``pyarrow.Table``; ``unreadable`` columns are not in it, for that reason."""
    from iql_torchrl.data.readers.arrow import ArrowRows, arrow_columns

    def read(column: str, start: int, stop: int) -> Any:
        return table.column(column)[start:stop]

    rows = ArrowRows(name, table.schema, table.num_rows, read, unreadable=unreadable or {})
    return Columns(name, arrow_columns(rows, mapping))


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
            except OverflowError:  # integers of more than 64 bits, which are ids
                arrays[key] = pa.array([str(cell) if type(cell) is int else cell for cell in cells])
            except (pa.ArrowException, TypeError, ValueError):
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
    levels = [n if isinstance(n, tuple) else (n,) for n in frame.columns]
    names = ["/".join(str(level) for level in each if level != "") for each in levels]
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


def open_datasets(source: Any, mapping: Mapping[str, str | None]) -> Columns:
    """The columns of a ``datasets.Dataset``, or of the folder that ``save_to_disk`` made of one.

    They are in its own order, which ``select`` or ``shuffle`` may set. Only what is asked for is read;
    a dataset on disk stays memory-mapped. Its format is not applied, with a warning if that is a
    function (``with_transform``). A ``ClassLabel`` of actions has the number of actions. Raises
    ``DatasetError`` for several splits, for a stream, and for a damaged folder.
    """
    from iql_torchrl.data.readers.arrow import ArrowRows, arrow_columns

    folder, dataset = source if isinstance(source, Path) else None, source
    name = folder.name if folder else type(dataset).__name__
    if folder:
        datasets = package("datasets", str(folder))
        # the package raises errors of many kinds for damaged folders
        with reading(folder, "cannot be read as a folder that save_to_disk wrote", Exception):
            dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, dict):
        first = next(iter(dataset), "train")
        raise DatasetError(
            f"{name}: holds the splits {', '.join(map(repr, dataset))}; pass one of them, "
            f"such as {folder / first if folder else f'source[{first!r}]'}."
        )
    if not hasattr(dataset, "__len__"):
        raise DatasetError(
            f"{name}: a stream has no number of rows; load it without streaming=True, and "
            "pass the Dataset."
        )
    columns = {c: dataset.select_columns([c]).with_format("arrow") for c in dataset.column_names}

    def read(column: str, start: int, stop: int) -> Any:
        return columns[column][start:stop].column(column)

    rows = ArrowRows(name, dataset.features.arrow_schema, len(dataset), read, folder)
    warnings = []
    if dataset.format.get("type") == "custom":
        warnings.append(
            f"{name}: its transform (with_transform, set_transform) is not applied, and the stored "
            "values are read; apply it with source.map(...) first."
        )
    named = [mapping["action"]] if mapping.get("action") else NAMES["action"]
    labels = (dataset.features.get(column) for column in named)
    counts = [int(each.num_classes) for each in labels if hasattr(each, "num_classes")]
    space = spaces.Discrete(counts[0]) if counts else None
    return Columns(name, arrow_columns(rows, mapping), space, tuple(warnings))


def is_saved_dataset(folder: Path) -> bool:
    """True if ``save_to_disk`` wrote the folder, of one table or of several splits."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
