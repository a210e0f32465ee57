"""Parquet files, read forwards by column in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["ParquetRows", "need_pyarrow", "parquet_files"]

#: About how many bytes of one column are decoded together.
BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 65_536


def need_pyarrow(path: Path) -> None:
    """Raises ``DatasetError`` saying what to install where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DatasetError(
            f"{path}: needs the package pyarrow ({one_line(error)}): "
            'pip install "iql_torchrl[readers]"'
        ) from error


def parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below ``folder``, in the order of the numbers in their paths.

    Raises ``DatasetError`` where their names tell several splits, such as ``train-00000-of-00002``.
    """

    def order(path: Path) -> tuple[list[int], str]:
        name = path.relative_to(folder).as_posix()
        return [int(digits) for digits in re.findall(r"\d+", name)], name

    files = sorted((p for p in folder.rglob("*.parquet") if p.is_file()), key=order)
    splits = sorted({split for path in files if (split := _split_of(path))})
    if len(splits) > 1:
        raise DatasetError(
            f"{folder}: holds the splits {', '.join(splits)}; pass the files of one of them, in a "
            "folder of their own."
        )
    return files


def _split_of(path: Path) -> str | None:
    """The split that a file's name tells: ``test.parquet``, ``train-00000-of-00002.parquet``."""
    found = re.fullmatch(r"(.+?)-\d+-of-\d+.*", path.stem)
    if found:
        return found[1]
    return (
        path.stem if path.stem in ("train", "test", "validation", "valid", "val", "dev") else None
    )


class ParquetRows:
    """The rows of Parquet files of the same columns, one file after the other.

    A column is read forwards in batches of about 8 MB of values, so that neither a file nor one of
    its row groups need fit into memory; reading rows before the last ones begins again at the
    row group that has them. Raises ``DatasetError`` naming the file that is damaged, or has other
    columns than the first.
    """

    def __init__(self, name: str, files: Sequence[Path], folder: Path | None = None) -> None:
        import pyarrow.parquet as pq

        self.name, self.folder, self.files = name, folder, list(files)
        counts = []
        for path in self.files:
            with _naming(path):
                metadata = pq.read_metadata(path)
                schema = metadata.schema.to_arrow_schema()
                counts.append(metadata.num_rows)
            if path is self.files[0]:
                self.schema = schema
            _check_columns(path, schema, self.files[0], self.schema)
        self._ends = np.cumsum(counts)
        self.rows = int(self._ends[-1])
        self._readers: dict[str, _ColumnReader] = {}

    def read(self, column: str, start: int, stop: int) -> Any:
        import pyarrow as pa

        chunks: list[Any] = []
        for number in range(int(np.searchsorted(self._ends, start, side="right")), len(self.files)):
            begin = int(self._ends[number - 1]) if number else 0
            if begin >= stop:
                break
            low, high = max(start, begin) - begin, min(stop, int(self._ends[number])) - begin
            if low < high:
                chunks.extend(self._reader(column, self.files[number]).read(low, high))
        return pa.chunked_array(chunks, self.schema.field(column).type)

    def _reader(self, column: str, path: Path) -> _ColumnReader:
        """The reader of one column, of the file that it has read last."""
        reader = self._readers.get(column)
        if reader is None or reader.path != path:
            reader = self._readers[column] = _ColumnReader(path, column)
        return reader


class _ColumnReader:
    """One column of one file: ``read`` decodes forwards from the row group of the first row."""

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow.parquet as pq

        self.path, self.column = path, column
        with _naming(path):
            self._file = pq.ParquetFile(
                path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
            )
        metadata = self._file.metadata
        groups = range(metadata.num_row_groups)
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in groups])
        size = max((_bytes(metadata.row_group(g), column) for g in groups), default=0)
        rows = max((metadata.row_group(g).num_rows for g in groups), default=1)
        self._batch = int(min(BATCH_ROWS, max(1, BATCH_BYTES * rows // max(size, 1))))
        self._batches: Iterator[Any] = iter(())
        self._held: list[Any] = []
        self._begin = self._end = 0

    def read(self, start: int, stop: int) -> list[Any]:
        """Arrow arrays with the rows ``start`` to ``stop - 1`` of the file."""
        if not self._held or not self._begin <= start <= self._end:
            group = int(np.searchsorted(self._ends, start, side="right"))
            self._begin = self._end = int(self._ends[group - 1]) if group else 0
            self._held = []
            self._batches = self._file.iter_batches(
                self._batch, range(group, len(self._ends)), [self.column], use_threads=False
            )
        while self._end < stop:
            with _naming(self.path):
                batch = next(self._batches, None)
            if batch is None:
                raise DatasetError(
                    f"{self.path}: {self.column} ends at row {self._end}, while the file announces "
                    f"{int(self._ends[-1])} rows; it is damaged: download or copy it again."
                )
            self._held.append(batch.column(self.column))
            self._end += len(batch)
            while self._held and self._begin + len(self._held[0]) <= start:
                self._begin += len(self._held.pop(0))
        parts, begin = [], self._begin
        for part in self._held:
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            if low < high:
                parts.append(part.slice(low, high - low))
            begin += len(part)
        return parts


def _bytes(group: Any, column: str) -> int:
    """Bytes of a column of a row group, decompressed."""
    parts = (group.column(number) for number in range(group.num_columns))
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema == column or part.path_in_schema.startswith(f"{column}.")
    )


def _check_columns(path: Path, schema: Any, first: Path, expected: Any) -> None:
    if schema.names != expected.names:
        differ = sorted(set(schema.names) ^ set(expected.names)) or schema.names
        raise DatasetError(
            f"{path}: its columns differ from those of {first.name} in {', '.join(differ)}; expected "
            "files of the same columns: load them one by one."
        )
    for name in schema.names:
        if schema.field(name).type != expected.field(name).type:
            raise DatasetError(
                f"{path}: {name} has the type {schema.field(name).type}, but "
                f"{expected.field(name).type} in {first.name}; expected files of the same types."
            )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of pyarrow as ``DatasetError`` naming the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path}: not a complete Parquet file ({one_line(error)}); download or copy it again."
        ) from error
