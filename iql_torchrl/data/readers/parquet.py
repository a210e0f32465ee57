"""Parquet files: the rows of one, or of all in a folder, one file after the other."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.data.readers.arrays import package, reading
from iql_torchrl.data.readers.arrow import LISTS, ArrowRows
from iql_torchrl.data.schema import DatasetError

pa, pq = (package(name, "a Parquet file") for name in ("pyarrow", "pyarrow.parquet"))

#: About how many bytes of the rows of a file are decoded together, and at most how many rows.
BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 65_536
#: So many files stay open, so that all columns share them: opening one decodes the metadata of all.
OPEN_FILES = 8
#: What a damaged Parquet file is called, and what pyarrow raises.
DAMAGED = ("not a complete Parquet file", pa.ArrowException, OSError)
#: Names of files that each are of one split.
SPLITS = ("train", "test", "validation", "valid", "val", "dev")


def parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below ``folder``, in the order of the numbers in their paths.

    Files and folders whose names begin with ``.`` or ``_`` are left out, as by other readers.
    Raises ``DatasetError`` where their names tell several splits, such as ``train-00000-of-00002``.
    """
    every = [path for path in folder.rglob("*.parquet") if path.is_file()]
    found = [p for p in every if not any(n[0] in "._" for n in p.relative_to(folder).parts)]
    relative = [path.relative_to(folder).as_posix() for path in found]
    order = [(list(map(int, re.findall(r"\d+", name))), name) for name in relative]
    files = [path for _, path in sorted(zip(order, found, strict=True))]
    names = {re.sub(r"-\d+-of-\d+.*", "", path.stem): path.stem for path in files}
    splits = sorted(name for name, stem in names.items() if name != stem or stem in SPLITS)
    if len(splits) > 1:
        raise DatasetError(
            f"{folder}: holds the splits {', '.join(splits)}; pass the files of one of them, in a "
            "folder of their own."
        )
    return files


def _folder_columns(files: Sequence[Path], folder: Path | None) -> dict[str, list[Any]]:
    """One value a file of the columns that folders name, such as ``episode=3/part-0.parquet``."""
    columns: dict[str, list[Any]] = {}
    for place, path in enumerate(files):
        for part in path.relative_to(folder).parts[:-1] if folder else ():
            name, is_column, value = part.partition("=")
            if is_column:
                columns.setdefault(name, [None] * len(files))[place] = urllib.parse.unquote(value)
    for name, values in columns.items():
        if all(
            value is not None and re.fullmatch(r"-?(0|[1-9]\d{0,17})", value) for value in values
        ):
            columns[name] = list(map(int, values))
    return columns


def parquet_rows(name: str, files: Sequence[Path], folder: Path | None = None) -> ArrowRows:
    """The rows of Parquet files, one file after the other.

    A column is read forwards in batches of rows of about 8 MB, so that neither a file nor one of its
    row groups need fit into memory. Types that differ in their size alone, such as int32 and int64, are
    cast to the wider one, and integers to floats. ``unreadable`` says which columns differ more, or are
    missing in some files. Names of folders such as ``episode=3`` are columns, unless the files have
    these. Raises ``DatasetError`` naming a damaged file.
    """
    groups: dict[Path, list[int]] = {}  # rows of the row groups of each file
    types, unreadable = dict[str, Any](), dict[str, str]()
    for path in files:
        with reading(path, *DAMAGED):
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        found = dict(zip(schema.names, schema.types, strict=True))
        for column in found | types if groups else ():
            kind, other = types.get(column), found.get(column)
            if (wider := _wider(kind, other)) is None and column not in unreadable:
                unreadable[column] = (
                    f"{path}: its columns differ from those of {files[0]} in {column}: "
                    f"{other or 'missing'}, {kind or 'missing'} before; expected a column of one "
                    "type in all files: cast it, or load the files one by one."
                )
            types[column] = wider or kind or other
        types = types if groups else found
        numbers = range(metadata.num_row_groups)
        groups[path] = [metadata.row_group(number).num_rows for number in numbers]
    counts = [sum(rows) for rows in groups.values()]
    constants = {
        name: pa.array(np.repeat(np.array(values, object), counts), pa.array(values).type)
        for name, values in _folder_columns(files, folder).items()
        if name not in types
    }
    #: By column: the row read last from, what is decoded from there on, and the batches after that.
    decoded: dict[str, tuple[int, list[Any], Iterator[Any]]] = {}
    opened = lru_cache(OPEN_FILES)(_open)

    def read(column: str, start: int, stop: int) -> Any:
        if column in constants:
            return constants[column][start:stop]
        kind = types[column]
        first, arrays, batches = decoded.get(column, (start + 1, [], iter(())))
        if not first <= start <= first + sum(map(len, arrays)):
            first, arrays, batches = start, [], _batches(groups, opened, column, start)
        while first + sum(map(len, arrays)) < stop:
            with reading(f"{name}: {column}", f"has values that are no {kind}", pa.ArrowException,
                         remedy="cast the column to one type in all files"):  # fmt: skip
                arrays.append(next(batches).cast(kind))
        values = pa.chunked_array(arrays, kind)[start - first :]
        decoded[column] = (start, values.chunks, batches)
        return values[: stop - start]

    kinds = types | {column: values.type for column, values in constants.items()}
    schema = pa.schema([(c, t) for c, t in kinds.items() if c not in unreadable])
    return ArrowRows(name, schema, sum(counts), read, folder, unreadable)


def _wider(first: Any, second: Any) -> Any:
    """The type that has all values of both types; None if there is none, or a type is None."""
    if first is None or second is None or first == second:
        return first if first == second else None
    if pa.types.is_null(first) or pa.types.is_null(second):
        return second if pa.types.is_null(first) else first
    if isinstance(first, LISTS) and isinstance(second, LISTS):
        inner = _wider(first.value_type, second.value_type)
        return None if inner is None else pa.large_list(inner)
    kinds = [pa.types.is_floating, pa.types.is_signed_integer, pa.types.is_unsigned_integer]
    if any(same(first) and same(second) for same in kinds):
        return first if first.bit_width > second.bit_width else second
    numbers = [pa.types.is_floating(kind) or pa.types.is_integer(kind) for kind in (first, second)]
    if all(numbers) and any(pa.types.is_floating(kind) for kind in (first, second)):
        return pa.float64()
    times = all(pa.types.is_timestamp(kind) for kind in (first, second))
    if times and first.tz == second.tz:
        return max(first, second, key=lambda kind: ("s", "ms", "us", "ns").index(kind.unit))
    return None


def _open(path: Path) -> Any:
    return pq.ParquetFile(
        path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
    )


def _batches(
    files: Mapping[Path, list[int]], opened: Callable[[Path], Any], column: str, start: int
) -> Iterator[Any]:
    """The rows of a column from ``start`` on; ``files``: the rows of the row groups of each."""
    end = 0
    for path, groups in files.items():
        with reading(path, *DAMAGED):
            file = None
            for number, rows in enumerate(groups):
                end += rows
                if not rows or end <= start:
                    continue
                file = file or opened(path)
                size = max(file.metadata.row_group(number).total_byte_size // rows, 1)
                size = max(1, min(BATCH_ROWS, BATCH_BYTES // size))
                skipped = max(rows - (end - start), 0)
                for batch in file.iter_batches(size, [number], [column], use_threads=False):
                    yield batch.column(column)[skipped:]
                    skipped = max(skipped - len(batch), 0)
