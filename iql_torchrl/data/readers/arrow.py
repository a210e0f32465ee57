"""Tables of Arrow columns, and Parquet files: one row a step, or one row an episode of sequences."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, PartsColumn, UnreadableColumn, package, reading
from iql_torchrl.data.readers.columns import NAMES
from iql_torchrl.data.readers.huggingface import HuggingFaceRows
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

pa, pc, pq = (
    package(name, "a table of Arrow columns")
    for name in ("pyarrow", "pyarrow.compute", "pyarrow.parquet")
)

#: About how many bytes of values are converted together.
PART_BYTES = 16 * 2**20
#: About how many bytes of the rows of a file are decoded together, and at most how many rows.
BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 65_536
#: Rows of a table of episodes that are looked at together to measure them.
EPISODES = 256
LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
#: What a damaged Parquet file is called, and what pyarrow raises.
DAMAGED = ("not a complete Parquet file", pa.ArrowException, OSError)
#: Names of files that each are of one split.
SPLITS = ("train", "test", "validation", "valid", "val", "dev")

ArrowRows: TypeAlias = "ParquetRows | HuggingFaceRows"


def arrow_columns(table: ArrowRows, mapping: Mapping[str, str | None]) -> dict[str, Column]:
    """The columns of ``table``, one row a step; of values only the first of each column are read.

    Fields of structs and names with dots become groups: ``observation.state`` is the leaf ``state``
    of ``observation``. Where the rewards (by their usual names, or what ``mapping`` names) are lists
    of other lengths than 1, a row of the table is an episode: then each list is a sequence in time,
    ``episode`` numbers the rows, a single boolean of an episode marks its last step, and other single
    values are left out. Observations and masks may be one longer than the rewards: then the last one
    is the observation after the last step, and ``next_observation`` (``next_action_mask``) is added.

    Raises ``DatasetError`` for a table without rows. The first use of a column raises it, naming the
    column and the row: empty values, rows or sequences of other lengths, damaged pictures.
    """
    if not table.rows:
        raise DatasetError(f"{table.name}: has no rows; expected at least one.")
    leaves = [leaf for field in table.schema for leaf in _leaves(table, field.name, field.type)]
    rewards = [mapping["reward"]] if mapping.get("reward") else NAMES["reward"]
    names = [str(name).replace(".", "/") for name in rewards]
    steps = next((leaf.lengths() for leaf in leaves if leaf.name in names), None)
    if steps is None or (steps == 1).all():
        return {leaf.name: _column(leaf) for leaf in leaves}
    columns: dict[str, Column] = {}
    for leaf in leaves:
        columns.update(_episode_columns(leaf, steps, mapping))
    columns["episode"] = np.repeat(np.arange(len(steps)), steps)
    return columns


def _leaves(
    table: ArrowRows, column: str, kind: Any, path: tuple[str, ...] = (), listed: bool = False
) -> Iterator[_Leaf]:
    """The kinds of values in a column of an Arrow type."""
    kind = getattr(kind, "storage_type", kind)  # of an extension, such as ``datasets.Array2D``
    if isinstance(kind, LISTS):
        yield from _leaves(table, column, kind.value_type, path, True)
    elif pa.types.is_struct(kind) and not _is_picture(kind):
        for field in kind:
            yield from _leaves(table, column, field.type, (*path, field.name), listed)
    else:
        yield _Leaf(table, column, path, kind, listed)


def _is_picture(kind: Any) -> bool:
    """Whether a type is of files of pictures: bytes, or a struct with them, as ``datasets.Image``."""
    if pa.types.is_struct(kind):
        return "bytes" in kind.names
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True)
class _Leaf:
    """The values of one kind in a column: the column itself, or a field of its structs.

    ``kind`` is the type of one value, which is inside lists if ``listed``.
    """

    table: ArrowRows
    column: str
    path: tuple[str, ...]
    kind: Any
    listed: bool

    @property
    def name(self) -> str:
        return "/".join((self.column.replace(".", "/"), *self.path))

    @property
    def subject(self) -> str:
        """The beginning of messages."""
        return f"{self.table.name}: {self.name}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values; another kind than numbers for what is not read, such as text."""
        if _is_picture(self.kind):
            return np.dtype(np.uint8)
        with suppress(NotImplementedError):
            return np.dtype(self.kind.to_pandas_dtype())
        return np.dtype(object)

    def read(self, start: int, stop: int) -> tuple[Any, tuple[str, ...]]:
        """Rows of the table as one array, down to its first lists, and the remaining path."""
        chunks, path = self.table.read(self.column, start, stop), self.path
        array = chunks.combine_chunks() if isinstance(chunks, pa.ChunkedArray) else chunks
        while path and pa.types.is_struct(array.type):
            array, path = pc.struct_field(array, path[0]), path[1:]
        return getattr(array, "storage", array), path

    def lengths(self) -> NDArray[np.int64] | None:
        """Lengths of the rows' lists, 0 for an empty one; None for a column of single values."""
        if not self.listed:
            return None
        parts = []
        for start in range(0, self.table.rows, EPISODES):
            array, _ = self.read(start, min(start + EPISODES, self.table.rows))
            parts.append(np.asarray(pc.fill_null(pc.list_value_length(array), 0), np.int64))
        return np.concatenate(parts)

    def values(self, array: Any, path: tuple[str, ...], row: Callable[[int], int]) -> NDArray[Any]:
        """The values of an array, ``(length, ...)``: nested lists become dimensions.

        Pictures (PNG, JPEG, ... as bytes, or paths below the table's folder) become uint8 ``(height,
        width)`` or ``(height, width, channels)``. ``row``: from a place in the array to its number.
        """
        array = getattr(array, "storage", array)
        if path and pa.types.is_struct(array.type):
            return self.values(pc.struct_field(array, path[0]), path[1:], row)
        if _is_picture(array.type):
            return self._pictures(array, row)
        if array.null_count:
            first = int(np.asarray(array.is_null()).argmax())
            raise DatasetError(
                f"{self.subject} has {array.null_count} empty values, first at row {row(first)}; "
                "expected numbers in every row: fill them, or leave those rows out."
            )
        if not isinstance(array.type, LISTS):
            values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
            return values
        sizes = np.asarray(pc.list_value_length(array))
        size = int(sizes[0]) if len(sizes) else 0
        if len(wrong := np.flatnonzero(sizes != size)):
            raise DatasetError(
                f"{self.subject} has lists of {size} and of {int(sizes[wrong[0]])} values, first at "
                f"row {row(int(wrong[0]))}; expected lists of one length, as an array has them."
            )
        inner = self.values(array.flatten(), path, lambda place: row(place // max(size, 1)))
        return inner.reshape(len(array), size, *inner.shape[1:])

    def _pictures(self, array: Any, row: Callable[[int], int]) -> NDArray[np.uint8]:
        pictures = [self._picture(item.as_py(), row(place)) for place, item in enumerate(array)]
        for place, picture in enumerate(pictures):
            if picture.dtype != np.uint8 or picture.shape != pictures[0].shape:
                raise DatasetError(
                    f"{self.subject} has a picture of shape {picture.shape} and dtype {picture.dtype} "
                    f"at row {row(place)}; expected uint8 pictures of one shape, here "
                    f"{pictures[0].shape}: convert them."
                )
        return np.array(pictures, np.uint8)

    def _picture(self, item: Any, row: int) -> NDArray[Any]:
        from PIL import Image

        data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, "")
        file = (self.table.folder or Path()) / (path or "")
        if data is None and path and file.is_file():
            data = file.read_bytes()
        if data is None:
            only = f", only the path {path!r}, where there is no file" if path else ""
            raise DatasetError(
                f"{self.subject} has no picture at row {row}{only}; expected the bytes of a PNG or "
                "JPEG file in every row."
            )
        try:
            with Image.open(io.BytesIO(data)) as picture:
                # Palettes hold indices of colours, not colours.
                return np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise DatasetError(
                f"{self.subject} has a damaged picture at row {row} ({one_line(error)}); repair or "
                "leave out that row."
            ) from error


def _column(
    leaf: _Leaf, steps: NDArray[np.int64] | None = None, extra: int | None = None
) -> Column:
    """The values of a leaf, a row of the table being a step, or ``steps`` of a sequence.

    Sequences have one entry more than steps where one is ``extra``, their first (0) or last (-1).
    """
    if leaf.dtype.kind not in "biuf":
        return UnreadableColumn(
            f"{leaf.subject} has values of the Arrow type {leaf.kind}; expected integers, floats or "
            "booleans: cast the column, or leave it out."
        )
    counts = np.ones(leaf.table.rows, np.int64) if steps is None else steps
    stored = counts + (extra is not None)
    begins = np.cumsum(stored) - stored

    def read(start: int, stop: int) -> NDArray[Any]:
        array, path = leaf.read(start, stop)
        values = array if steps is None else array.flatten()
        numbers = leaf.values(values, path, lambda place: int(begins[start]) + place)
        if extra is None:
            return numbers
        dropped = begins[start:stop] - begins[start] + (0 if extra == 0 else counts[start:stop])
        return np.delete(numbers, dropped, axis=0)

    shape: tuple[int, ...] = ()
    if counts.any():
        first = int(counts.argmax())
        try:
            shape = read(first, first + 1).shape[1:]
        except DatasetError as error:  # only an error if the column is used
            return UnreadableColumn(str(error))
    most = max(1, PART_BYTES // (int(np.prod(shape)) * leaf.dtype.itemsize or 1))
    firsts = np.unique((np.cumsum(counts) - counts) // most, return_index=True)[1]
    parts = list(pairwise([*firsts.tolist(), len(counts)]))

    def part(number: int) -> NDArray[Any]:
        values = read(*parts[number])
        if values.shape[1:] != shape:
            raise DatasetError(
                f"{leaf.subject} has values of shape {values.shape[1:]} from row {parts[number][0]} "
                f"on, and of {shape} before; expected one shape."
            )
        return values

    return PartsColumn([int(counts[a:b].sum()) for a, b in parts], part, shape, leaf.dtype)


def _episode_columns(
    leaf: _Leaf, steps: NDArray[np.int64], mapping: Mapping[str, str | None]
) -> dict[str, Column]:
    """The columns of steps of one column of episodes."""
    sizes = leaf.lengths()
    if sizes is None:
        if leaf.dtype.kind != "b":
            return {}
        marks = np.zeros(int(steps.sum()), np.bool_)
        values = leaf.values(*leaf.read(0, leaf.table.rows), lambda place: place)
        marks[np.cumsum(steps)[steps > 0] - 1] = values[steps > 0]
        return {leaf.name: marks}
    following = _following_name(leaf.name, mapping)
    if following and np.array_equal(sizes, steps + 1):
        return {leaf.name: _column(leaf, steps, -1), following: _column(leaf, steps, 0)}
    if len(wrong := np.flatnonzero(sizes != steps)):
        reason = (
            f"{leaf.subject} has {sizes[wrong[0]]} steps in the episode of row {wrong[0]}, whose "
            f"reward has {steps[wrong[0]]}; expected one entry per step"
            f"{', or one more in every episode' if following else ''}."
        )
        return {leaf.name: UnreadableColumn(reason)}
    return {leaf.name: _column(leaf, steps)}


def _following_name(name: str, mapping: Mapping[str, str | None]) -> str | None:
    """The name of the column of successors, for observations and masks."""
    for key in ("observation", "action_mask"):
        known = [str(mapping[key]).replace(".", "/")] if mapping.get(key) else NAMES[key]
        for path in known:
            if name == path or name.startswith(f"{path}/"):
                return str(mapping.get(f"next_{key}") or f"next_{key}") + name[len(path) :]
    return None


def parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below ``folder``, in the order of the numbers in their paths.

    Raises ``DatasetError`` where their names tell several splits, such as ``train-00000-of-00002``.
    """

    def order(path: Path) -> tuple[list[int], str]:
        name = path.relative_to(folder).as_posix()
        return [int(digits) for digits in re.findall(r"\d+", name)], name

    files = sorted((p for p in folder.rglob("*.parquet") if p.is_file()), key=order)
    names = {re.sub(r"-\d+-of-\d+.*", "", path.stem): path.stem for path in files}
    splits = sorted(name for name, stem in names.items() if name != stem or stem in SPLITS)
    if len(splits) > 1:
        raise DatasetError(
            f"{folder}: holds the splits {', '.join(splits)}; pass the files of one of them, in a "
            "folder of their own."
        )
    return files


class ParquetRows:
    """The rows of Parquet files of the same columns, one file after the other.

    A column is read forwards in batches of rows of about 8 MB, so that neither a file nor one of its
    row groups need fit into memory. Raises ``DatasetError`` naming a damaged or different file.
    """

    def __init__(self, name: str, files: Sequence[Path], folder: Path | None = None) -> None:
        self.name, self.folder, self.rows = name, folder, 0
        self._groups: dict[Path, list[int]] = {}  # rows of the row groups of each file
        for path in files:
            with reading(path, *DAMAGED):
                metadata = pq.read_metadata(path)
                schema = metadata.schema.to_arrow_schema()
            if not self._groups:
                self.schema = schema
            types, expected = (
                set(zip(s.names, s.types, strict=True)) for s in (schema, self.schema)
            )
            if types != expected:
                differ = sorted(f"{column}: {kind}" for column, kind in types ^ expected)
                raise DatasetError(
                    f"{path}: its columns differ from those of {files[0].name} in {', '.join(differ)}; "
                    "expected files of the same columns and types: load them one by one."
                )
            groups = range(metadata.num_row_groups)
            self._groups[path] = [metadata.row_group(number).num_rows for number in groups]
            self.rows += metadata.num_rows
        #: By column: the row read last from, what is decoded from there on, and the batches after that.
        self._decoded: dict[str, tuple[int, list[Any], Iterator[Any]]] = {}

    def read(self, column: str, start: int, stop: int) -> Any:
        """The column's rows ``start`` to ``stop - 1`` as a chunked array."""
        first, arrays, batches = self._decoded.get(column, (start + 1, [], iter(())))
        if not first <= start <= first + sum(map(len, arrays)):
            first, arrays, batches = start, [], _batches(self._groups, column, start)
        while first + sum(map(len, arrays)) < stop:
            arrays.append(next(batches))
        values = pa.chunked_array(arrays, self.schema.field(column).type)[start - first :]
        self._decoded[column] = (start, values.chunks, batches)
        return values[: stop - start]


def _batches(files: Mapping[Path, list[int]], column: str, start: int) -> Iterator[Any]:
    """The rows of a column from ``start`` on; ``files``: the rows of the row groups of each."""
    end = 0
    for path, groups in files.items():
        with reading(path, *DAMAGED):
            file = None
            for number, rows in enumerate(groups):
                end += rows
                if not rows or end <= start:
                    continue
                file = file or pq.ParquetFile(
                    path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
                )
                size = max(file.metadata.row_group(number).total_byte_size // rows, 1)
                size = max(1, min(BATCH_ROWS, BATCH_BYTES // size))
                skipped = max(rows - (end - start), 0)
                for batch in file.iter_batches(size, [number], [column], use_threads=False):
                    yield batch.column(column)[skipped:]
                    skipped = max(skipped - len(batch), 0)
