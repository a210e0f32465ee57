"""Tables of Arrow columns: one row a step, or one row an episode of sequences."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, UnreadableColumn, column_of_parts, package
from iql_torchrl.data.readers.columns import NAMES
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

pa, pc = (package(name, "a table of Arrow columns") for name in ("pyarrow", "pyarrow.compute"))

#: About how many bytes of values are converted together.
PART_BYTES = 16 * 2**20
#: Rows of a table of episodes that are looked at together to measure them.
EPISODES = 256
LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)


@dataclass(frozen=True)
class ArrowRows:
    """Rows of Arrow columns, read when they are asked for.

    ``read(column, start, stop)`` gives the column's rows ``start`` to ``stop - 1`` as an array or
    chunked array. ``folder``: of the files that rows name. ``unreadable``: by their names, columns that
    are not in ``schema``, and the reason.
    """

    name: str
    schema: Any
    rows: int
    read: Callable[[str, int, int], Any]
    folder: Path | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)


def arrow_columns(table: ArrowRows, mapping: Mapping[str, str | None]) -> dict[str, Column]:
    """The columns of ``table``, one row a step; of values only the first of each column are read.

    Fields of structs and names with dots become groups; a last number, as in ``action.0``, stays. Dates
    and times become seconds, decimal numbers floats, and missing floats and rewards NaN. Where the
    rewards are lists of other lengths than 1, a row of the table is an episode: each list is a sequence
    in time, ``episode`` numbers the rows unless each step has an id, a single boolean is True at the
    last step, and other single values are left out. Where observations and masks are one longer, the
    last one becomes the last ``next_observation`` (``next_action_mask``).

    Raises ``DatasetError`` for a table without rows. The first use of a column raises it, naming the
    column and the row: empty values, rows or sequences of other lengths, damaged pictures.
    """
    if not table.rows:
        raise DatasetError(f"{table.name}: has no rows; expected at least one.")
    names = Counter(table.schema.names)
    fields = [each for each in table.schema if names[each.name] == 1]
    columns: dict[str, Column] = {
        name: UnreadableColumn(f"{table.name}: {count} columns are named {name}; rename one.")
        for name, count in names.items()
        if count > 1
    }
    for name, reason in table.unreadable.items():
        columns[name.replace(".", "/")] = UnreadableColumn(reason)
    rewards = [mapping["reward"]] if mapping.get("reward") else NAMES["reward"]
    known = [str(name).replace(".", "/") for name in rewards]
    leaves = [
        replace(leaf, as_float=leaf.name in known)
        for each in fields
        for leaf in _leaves(table, each.name, each.type)
    ]
    steps = next((leaf.lengths() for leaf in leaves if leaf.name in known), None)
    if steps is None or (steps == 1).all():
        return columns | {leaf.name: _column(leaf) for leaf in leaves}
    for leaf in leaves:
        columns.update(_episode_columns(leaf, steps, mapping))
    # a row may be a batch of several episodes, as RLlib writes them, with the id of each step
    if not {mapping.get("episode"), *NAMES["episode"], "eps_id"} & columns.keys():
        columns["episode"] = np.repeat(np.arange(len(steps)), steps)
    return columns


def _leaves(
    table: ArrowRows, column: str, kind: Any, path: tuple[str, ...] = (), listed: bool = False
) -> Iterator[_Leaf]:
    """The kinds of values in a column of an Arrow type."""
    if isinstance(kind, pa.FixedShapeTensorType):
        yield _Leaf(table, column, path, kind.value_type, listed)
        return
    kind = getattr(kind, "storage_type", kind)  # of an extension, such as ``datasets.Array2D``
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, LISTS):
        yield from _leaves(table, column, kind.value_type, path, True)
    elif pa.types.is_struct(kind) and not _is_picture(kind):
        for each in kind:
            yield from _leaves(table, column, each.type, (*path, each.name), listed)
    else:
        yield _Leaf(table, column, path, kind, listed)


def _stored(array: Any) -> Any:
    """The storage of an array of an extension type, other than tensors, whose shape it lacks."""
    is_tensor = isinstance(array.type, pa.FixedShapeTensorType)
    return array if is_tensor else getattr(array, "storage", array)


def _is_time(kind: Any) -> bool:
    return bool(pa.types.is_temporal(kind) and not pa.types.is_interval(kind))


def _seconds(array: Any) -> NDArray[np.float64]:
    """Times, dates (from 1970 on, UTC) and durations in seconds."""
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("ms"))
    elif pa.types.is_time32(array.type):
        array = array.cast(pa.time64("us"))
    unit = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[array.type.unit]
    floats = array.cast(pa.int64()).cast(pa.float64(), safe=False)
    return np.asarray(floats.to_numpy(zero_copy_only=False) / unit)


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_picture(kind: Any) -> bool:
    """True if a type is of files of pictures: bytes, or a struct with them, as ``datasets.Image``."""
    if pa.types.is_struct(kind):
        return "bytes" in kind.names
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True)
class _Leaf:
    """The values of one kind in a column: the column itself, or a field of its structs.

    ``kind`` is the type of one value, which is inside lists if ``listed``. ``as_float``: integers are
    floats, so that they may be missing.
    """

    table: ArrowRows
    column: str
    path: tuple[str, ...]
    kind: Any
    listed: bool
    as_float: bool = False

    @property
    def name(self) -> str:
        return "/".join((re.sub(r"\.(?!\d+$)", "/", self.column), *self.path))

    @property
    def subject(self) -> str:
        """The beginning of messages."""
        return f"{self.table.name}: {self.name}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values; objects for text, and for what is not read."""
        if _is_picture(self.kind):
            return np.dtype(np.uint8)
        if _is_time(self.kind) or pa.types.is_decimal(self.kind):
            return np.dtype(np.float64)
        with suppress(NotImplementedError, TypeError):  # TypeError: intervals and periods of pandas
            dtype = np.dtype(self.kind.to_pandas_dtype())
            return np.dtype(np.float64) if self.as_float and dtype.kind in "iu" else dtype
        return np.dtype(object)

    def read(self, start: int, stop: int) -> tuple[Any, tuple[str, ...]]:
        """Rows of the table as one array, down to its first lists, and the remaining path."""
        chunks, path = self.table.read(self.column, start, stop), self.path
        array = chunks.combine_chunks() if isinstance(chunks, pa.ChunkedArray) else chunks
        while path and pa.types.is_struct(array.type):
            array, path = pc.struct_field(array, path[0]), path[1:]
        return _stored(array), path

    def lengths(self) -> NDArray[np.int64] | None:
        """Lengths of the rows' lists, 0 for an empty one; None for a column of single values."""
        if not self.listed:
            return None
        parts = []
        for start in range(0, self.table.rows, EPISODES):
            array, _ = self.read(start, min(start + EPISODES, self.table.rows))
            parts.append(np.asarray(pc.fill_null(pc.list_value_length(array), 0), np.int64))
        return np.concatenate(parts)

    def first_known(self, counts: NDArray[np.int64]) -> int:
        """The first row that has steps, by their ``counts``, and is not missing, if there is one."""
        for start in range(0, self.table.rows, EPISODES):
            array, _ = self.read(start, min(start + EPISODES, self.table.rows))
            known = np.asarray(array.is_valid()) & (counts[start : start + EPISODES] > 0)
            if known.any():
                return start + int(known.argmax())
        return int(counts.argmax())

    def values(self, array: Any, path: tuple[str, ...], row: Callable[[int], int]) -> NDArray[Any]:
        """The values of an array, ``(length, ...)``: nested lists become dimensions.

        Pictures (PNG, JPEG, ... as bytes, or paths below the table's folder) become uint8 ``(height,
        width)`` or ``(height, width, channels)``. ``row``: from a place in the array to its number.
        """
        array = _stored(array)
        if isinstance(array.type, pa.FixedShapeTensorType):
            flat = self._lists(array.storage, path, row)
            order = array.type.permutation or range(len(array.type.shape))
            return flat.reshape(len(flat), *array.type.shape).transpose(0, *(1 + np.argsort(order)))
        if path and pa.types.is_struct(array.type):
            return self.values(pc.struct_field(array, path[0]), path[1:], row)
        if _is_picture(array.type):
            return self._pictures(array, row)
        if array.null_count and self.dtype.kind != "f":
            first = int(np.asarray(array.is_null()).argmax())
            raise DatasetError(
                f"{self.subject} has {array.null_count} empty values, first at row {row(first)}; "
                "expected a value in every row: fill them, or leave those rows out."
            )
        if isinstance(array.type, LISTS):
            return self._lists(array, path, row)
        if pa.types.is_dictionary(array.type):
            texts = array.dictionary
            if _is_text(texts.type):  # polars' string_view cannot be decoded
                texts = texts.cast(pa.large_string())
            array = pa.DictionaryArray.from_arrays(array.indices, texts).dictionary_decode()
        if _is_time(array.type):
            return _seconds(array)
        if pa.types.is_decimal(array.type):
            array = array.cast(pa.float64())
        values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return values

    def _lists(self, array: Any, path: tuple[str, ...], row: Callable[[int], int]) -> NDArray[Any]:
        """Lists of one length as an array; NaN for a missing list, 0 columns if all are missing."""
        sizes = np.asarray(pc.fill_null(pc.list_value_length(array), -1))
        known = np.flatnonzero(sizes >= 0)
        size = int(sizes[known[0]]) if len(known) else 0
        if len(wrong := known[sizes[known] != size]):
            raise DatasetError(
                f"{self.subject} has lists of {size} and of {int(sizes[wrong[0]])} values, first at "
                f"row {row(int(wrong[0]))}; expected lists of one length, as an array has them."
            )
        # without those of missing lists
        inner = self.values(array.flatten(), path, lambda n: row(int(known[n // max(size, 1)])))
        inner = inner.reshape(len(known), size, *inner.shape[1:])
        if len(known) == len(array):
            return inner
        values = np.full((len(array), *inner.shape[1:]), np.nan, inner.dtype)
        values[known] = inner
        return values

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
    if leaf.dtype.kind not in "biuf" and not _is_text(leaf.kind):
        return UnreadableColumn(
            f"{leaf.subject} has values of the Arrow type {leaf.kind}; expected integers, floats, "
            "booleans, times or text: cast the column, or leave it out."
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
        first = leaf.first_known(counts)
        try:
            shape = read(first, first + 1).shape[1:]
        except DatasetError as error:  # only an error if the column is used
            return UnreadableColumn(str(error))
    most = max(1, PART_BYTES // (int(np.prod(shape)) * leaf.dtype.itemsize or 1))
    firsts = np.unique((np.cumsum(counts) - counts) // most, return_index=True)[1]
    parts = list(pairwise([*firsts.tolist(), len(counts)]))

    def part(number: int) -> NDArray[Any]:
        values = read(*parts[number])
        if not values.size and values.dtype.kind == "f":  # all are missing
            return np.full((len(values), *shape), np.nan, values.dtype)
        if values.shape[1:] != shape:
            raise DatasetError(
                f"{leaf.subject} has values of shape {values.shape[1:]} from row {parts[number][0]} "
                f"on, and of {shape} before; expected one shape."
            )
        return values

    return column_of_parts([int(counts[a:b].sum()) for a, b in parts], part, shape, leaf.dtype)


def _episode_columns(
    leaf: _Leaf, steps: NDArray[np.int64], mapping: Mapping[str, str | None]
) -> dict[str, Column]:
    """The columns of steps of one column of episodes."""
    sizes = leaf.lengths()
    if sizes is None:
        if leaf.dtype.kind != "b":
            return {}
        flags = np.zeros(int(steps.sum()), np.bool_)
        values = leaf.values(*leaf.read(0, leaf.table.rows), lambda place: place)
        flags[np.cumsum(steps)[steps > 0] - 1] = values[steps > 0]
        return {leaf.name: flags}
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
