"""Columns of a table: arrays of files, dicts and TensorDicts, sliced by rows."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import h5py
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from iql_torchrl.data.codec import UNCHANGED, Adaptation
from iql_torchrl.data.schema import DatasetError, Key, MissingPackageError
from iql_torchrl.descriptions import one_line

Flags = NDArray[np.bool_]
#: About how many bytes of parts that were read are kept in memory.
KEPT_BYTES = 64 * 2**20
#: A date and time in ISO 8601: day, time, and the zone's sign, hours and minutes.
DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)"
    r"(?:[T ](\d\d(?::\d\d(?::\d\d(?:\.\d{1,6})?)?)?)(?:(?<=\.\d{6})\d+)?"
    r"(?:Z|([-+])(\d\d):?(\d\d)?)?)?"
)
#: What damaged files are called, and what NumPy and zipfile, and h5py, raise for them.
DAMAGED_NPZ = (
    "not a complete npz archive", OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile,
)  # fmt: skip
DAMAGED_HDF5 = ("not a complete HDF5 file", OSError, RuntimeError, KeyError)


@contextmanager
def reading(
    subject: Path | str, problem: str, *errors: type[Exception],
    remedy: str = "download, copy or save it again",
) -> Iterator[None]:  # fmt: skip
    """``errors`` of the block as ``DatasetError``: what is wrong with a source, and what to do."""
    try:
        yield
    except DatasetError:
        raise
    except errors as error:
        raise DatasetError(f"{subject}: {problem} ({one_line(error)}); {remedy}.") from error


def package(name: str, reader: str, extra: str = "readers") -> Any:
    """An optional package. ``MissingPackageError`` says how to install it for ``reader``."""
    try:
        return import_module(name)
    except ImportError as error:
        needed = name.partition(".")[0]
        raise MissingPackageError(
            f"{reader}: needs the package {needed} ({one_line(error)}): "
            f'pip install "iql_torchrl[{extra}]"'
        ) from error


class Column(Protocol):
    """An array, or an object on disk that can be sliced by rows like an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True)
class Columns:
    """The columns of a source by their names in it (groups joined by ``/``), and what it records.

    Every column has one row for each step. The spaces, the environment and the reference scores are
    those that the source records, if any. ``warnings`` become ``DatasetWarning``. ``text``: the
    source does not say which integers are meant as floats. ``adaptation``: how the environment's
    observations and actions become these. ``named``: the names are ours already.

    ``columns.name_columns`` gives the same by our names (``observation``, ``observation/leaf``,
    ``next/observation``, ``next/reward``, ``action``, ...), with ``paths``, the source's names by our
    keys, and ``unused``, its other columns. ``order``: the source's row of each row, if sorted.
    """

    name: str
    columns: Mapping[str, Column]
    action_space: gym.Space[Any] | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    observation_space: gym.Space[Any] | None = None
    env_spec: EnvSpec | None = None
    reference_scores: tuple[float, float] | None = None
    text: bool = False
    adaptation: Adaptation = UNCHANGED
    named: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, Column] = field(default_factory=dict)
    order: NDArray[np.int64] | None = None

    @property
    def rows(self) -> int:
        return int(next(iter(self.columns.values())).shape[0])

    def leaves(self, group: str) -> dict[Key, Column]:
        """The columns of ``group`` or below it, by the keys of the observation's leaves."""
        leaves = group_of(self.columns, group)
        return {("observation", *key): column for key, column in leaves.items()}

    def source_row(self, row: int) -> int:
        """The row of the source that is row ``row`` here."""
        return int(row if self.order is None else self.order[row])

    def place_of(self, wrong: NDArray[np.bool_]) -> str:
        """How many rows are ``wrong`` ``(rows,)``, and which row of the source is the first."""
        first = self.source_row(int(wrong.argmax()))
        return f"{int(wrong.sum())} of {self.rows} rows, first at row {first}"


def group_of(columns: Mapping[str, Column], path: str) -> dict[Key, Column]:
    """The column ``path`` by the key ``()``, or those of the group ``path`` by their further names."""
    return {
        tuple(name.removeprefix(path).split("/")[1:]): column
        for name, column in columns.items()
        if name == path or name.startswith(f"{path}/")
    }


class UnreadableColumn:
    """A column that cannot be read: its first use raises ``DatasetError`` with ``reason``."""

    dtype = np.dtype(object)

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def shape(self) -> tuple[int, ...]:
        raise DatasetError(self._reason)

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        raise DatasetError(self._reason)


@dataclass
class ComputedColumn:
    """A column whose rows ``read`` gives; nothing is copied before it is asked for.

    ``ids``: the text of integers that ``read`` rounds to floats, which tells ids apart.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[slice], NDArray[Any]]
    ids: NDArray[Any] | None = None

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        return self.read(rows)


def columns_of_parts(
    lengths: Sequence[int] | NDArray[np.int64],
    read: Callable[[int], Mapping[str, NDArray[Any]]],
    name: str = "",
) -> dict[str, Column]:
    """Columns whose rows lie in consecutive parts that are read together, such as episodes.

    ``read(number)`` returns the columns of one part, each with ``lengths[number]`` rows; the first part
    with rows has all columns. The part read last is kept in memory, and those before it as long as they
    have at most ``KEPT_BYTES``: reading a smaller slice of several columns, one after the other, reads
    each part once. ``name`` begins messages; there a part is an episode.
    """
    kept, used = dict[int, Mapping[str, NDArray[Any]]](), 0

    def part(number: int) -> Mapping[str, NDArray[Any]]:
        nonlocal used
        if number not in kept:
            while kept and used > KEPT_BYTES:
                used -= sum(values.nbytes for values in kept.pop(next(iter(kept))).values())
            kept[number] = read(number)
            used += sum(values.nbytes for values in kept[number].values())
        return kept[number]

    if not len(lengths):
        return {}
    columns = dict[str, Column]()
    for key, each in part(int((np.asarray(lengths) > 0).argmax())).items():
        values = partial(lambda key, number: part(number).get(key), key)
        subject = f"{name}: {key}"
        columns[key] = column_of_parts(lengths, values, each.shape[1:], each.dtype, subject)
    return columns


def column_of_parts(
    lengths: Sequence[int] | NDArray[np.int64],
    read: Callable[[int], NDArray[Any] | None],
    row_shape: tuple[int, ...],
    dtype: Any,
    subject: str = "a column",
) -> Column:
    """One column whose rows lie in consecutive parts; ``read(number)`` returns those of one part.

    The part read last is kept in memory. Text has the dtype object: its length varies.
    """
    sizes, dtype = np.asarray(lengths, np.int64), np.dtype(dtype)
    dtype = np.dtype(object) if dtype.kind in "US" else dtype
    ends, part_of = np.cumsum(sizes), lru_cache(maxsize=1)(read)

    def values_of(rows: slice) -> NDArray[Any]:
        start, stop, _ = rows.indices(int(sizes.sum()))
        values = np.empty((max(stop - start, 0), *row_shape), dtype)
        if start >= stop:
            return values
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        for number in (first + np.flatnonzero(sizes[first : last + 1])).tolist():
            part, expected = part_of(number), (int(sizes[number]), *row_shape)
            if part is None or part.shape != expected or not np.can_cast(part.dtype, dtype):
                found = "is missing"
                if part is not None:
                    found = f"has shape {part.shape} and dtype {part.dtype}"
                raise DatasetError(
                    f"{subject} of episode {number} {found}; expected {expected} and {dtype}: one row "
                    "per step, as in the other episodes. Repair the source, or leave the column out."
                )
            begin = int(ends[number] - sizes[number])
            low, high = max(start, begin), min(stop, int(ends[number]))
            values[low - start : high - start] = part[low - begin : high - begin]
        return values

    return ComputedColumn((int(sizes.sum()), *row_shape), dtype, values_of)


def chosen_rows(columns: Mapping[str, Column], keep: NDArray[np.bool_]) -> dict[str, Column]:
    """The columns without the rows where ``keep`` is False; their values are not copied."""
    kept = np.flatnonzero(keep)

    def read(column: Column, rows: slice) -> NDArray[Any]:
        chosen = kept[rows]
        start, stop = (int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else (0, 0)
        return np.asarray(column[start:stop])[chosen - start]

    return {
        name: column
        if isinstance(column, UnreadableColumn)
        else ComputedColumn((len(kept), *column.shape[1:]), column.dtype, partial(read, column))
        for name, column in columns.items()
    }


def open_npz(path: Path) -> dict[str, Column]:
    """The arrays of an archive. Raises ``DatasetError`` naming a damaged file.

    An array that ``numpy.savez`` wrote is read by rows when it is asked for. One of
    ``numpy.savez_compressed`` is read whole.
    """
    # Opened here: NumPy leaves a file open that turns out not to be an archive.
    with reading(path, *DAMAGED_NPZ), open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DatasetError(
                f"{path}: contains one array of shape {archive.shape}; expected an archive of "
                "named columns, as numpy.savez writes it."
            )
        members = {info.filename: info for info in archive.zip.infolist()}
        columns: dict[str, Column] = {}
        for name in archive.files:
            info = members.get(f"{name}.npy")
            stored = _stored(path, info) if info else None
            columns[name] = archive[name] if stored is None else stored
    return {name: column for name, column in columns.items() if column.shape}


def _stored(path: Path, member: zipfile.ZipInfo) -> Column | None:
    """An array read by rows, if it is not compressed and its rows are contiguous; else None.

    The first use of its values compares the checksum of the whole array. An array of Python objects,
    which are never unpickled, is empty.
    """
    with zipfile.ZipFile(path) as archive, archive.open(member) as header:
        version, _ = np.lib.format.read_magic(header)
        if (read_header := getattr(np.lib.format, f"read_array_header_{version}_0", None)) is None:
            return None
        shape, by_columns, dtype = read_header(header)
        begin = member.header_offset + 30 + header.tell()  # after a local header of 30 bytes,
    if dtype.hasobject:
        return np.empty(0, object)
    contiguous = shape and not (by_columns and len(shape) > 1)
    if member.compress_type != zipfile.ZIP_STORED or not contiguous:
        return None
    with open(path, "rb") as file:  # and after a name and extra fields, whose lengths end it
        file.seek(member.header_offset + 26)
        begin += int(np.fromfile(file, "<u2", 2).sum())
    size, checked = int(np.prod(shape[1:])), False

    def read(rows: slice) -> NDArray[Any]:
        nonlocal checked
        start, stop, _ = rows.indices(shape[0])
        count = max(stop - start, 0)
        with reading(path, *DAMAGED_NPZ), open(path, "rb") as file:
            if not checked:
                with zipfile.ZipFile(file) as archive, archive.open(member) as values:
                    while values.read(2**22):
                        checked = True
            file.seek(begin + start * size * dtype.itemsize)
            return np.fromfile(file, dtype, count * size).reshape(count, *shape[1:])

    return ComputedColumn(shape, dtype, read)


def group_numbered(columns: Mapping[str, Column], name: str) -> dict[str, Column]:
    """The columns with ``a.0``, ``a.1``, ... as one array ``a``, and other dots as ``/``.

    The number in a name is the place in the array, wherever the column stands. Nothing is read before
    it is asked for. Arrays of integers stay integers, as categories must. Columns that are not one
    number a row stay as they are; also those of which a number is missing or occurs twice: then the
    first use of ``a`` raises ``DatasetError``. ``name``: of the source.
    """
    arrays: dict[str, dict[str, int]] = {}  # by name, the columns of each array and their places
    for column in columns:
        array, _, place = column.rpartition(".")
        if array and place.isdecimal() and _is_single(columns[column]):
            arrays.setdefault(array, {})[column] = int(place)
    grouped = {column: values for column, values in columns.items() if "." not in column}
    for array, places in arrays.items():
        listed = [array] * (array in columns) + list(places)
        if [*sorted(places.values())] == list(range(len(listed))):
            ordered = sorted(places, key=lambda column: places[column])
            grouped[array.replace(".", "/")] = side_by_side([columns[c] for c in ordered])
            continue
        grouped |= {column: columns[column] for column in places}
        grouped[array.replace(".", "/")] = UnreadableColumn(
            f"{name}: the columns of {array!r} are {', '.join(listed)}; expected {array}, or "
            f"{array}.0, {array}.1 and so on without a gap."
        )
    taken = {column for places in arrays.values() for column in places}
    for column, values in columns.items():
        if "." in column and column not in taken:
            grouped.setdefault(column.replace(".", "/"), values)
    return grouped


def _is_single(column: Column) -> bool:
    return isinstance(column, UnreadableColumn) or int(np.prod(column.shape[1:])) == 1


def side_by_side(columns: Sequence[Column], dtype: Any = None) -> Column:
    """Columns as one array ``(rows, numbers)`` of flattened rows, by default of their common dtype."""
    try:
        rows = sorted({int(column.shape[0]) for column in columns})
    except DatasetError as error:  # only an error if the array is used
        return UnreadableColumn(str(error))
    if len(rows) > 1:
        return UnreadableColumn(f"columns of {rows[0]} and of {rows[-1]} rows are no array.")
    kinds = [np.dtype(column.dtype) for column in columns]
    kind = np.dtype(dtype or (object if np.dtype(object) in kinds else np.result_type(*kinds)))
    widths = [int(np.prod(column.shape[1:])) for column in columns]

    def read(part: slice) -> NDArray[Any]:
        parts = [np.asarray(column[part], kind) for column in columns]
        return np.hstack(
            [each.reshape(len(each), w) for each, w in zip(parts, widths, strict=True)]
        )

    return ComputedColumn((rows[0], sum(widths)), kind, read)


def open_hdf5(path: Path) -> dict[str, Column]:
    """The file's arrays by path, not yet read. Raises ``DatasetError`` naming a damaged file."""
    arrays = hdf5_arrays(path)
    for part in hdf5_parts(path, arrays):
        if not part.is_file():
            raise DatasetError(
                f"{path}: takes part of its data from the file {part}, which does not exist; HDF5 "
                "would read fill values in its place. Put the file there."
            )
    return arrays


def hdf5_arrays(path: Path) -> dict[str, Column]:
    arrays: dict[str, Column] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim:
            arrays[name] = item

    with reading(path, *DAMAGED_HDF5):
        h5py.File(path, "r").visititems(visit)
    return arrays


def hdf5_parts(path: Path, arrays: Mapping[str, Any]) -> tuple[Path, ...]:
    """Other files from which arrays take their data; names with a pattern (``%b``) are left out."""
    names: set[str] = set()
    for array in arrays.values():
        if array.is_virtual:
            names.update(source.file_name for source in array.virtual_sources())
        names.update(name for name, _, _ in array.external or ())
    file_names = sorted(name for name in names if name != "." and "%" not in name)
    # HDF5 looks beside the file first, then in the current folder.
    candidates = [(path.parent / name, Path(name)) for name in file_names]
    return tuple(
        here if not name.is_file() or here.is_file() else name for here, name in candidates
    )


def flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Column]:
    """Nested mappings, and structured arrays, of arrays as one level, names joined by ``/``."""
    flat: dict[str, Column] = {}
    for name, value in arrays.items():
        path = f"{prefix}{name}"
        if names := getattr(getattr(value, "dtype", None), "names", None):
            value = {field: value[field] for field in names}
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = array_of(value, path)
    return flat


def array_of(value: Any, name: str) -> NDArray[Any]:
    """A tensor, array or list as an array; bfloat16, which NumPy lacks, as float32.

    Rows of different shapes become objects, an error only if the column is used. Raises
    ``DatasetError`` for tensors that are not dense, and for masked values.
    """
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        try:
            return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        except (TypeError, RuntimeError) as error:
            raise DatasetError(
                f"{name}: a tensor of dtype {value.dtype} and layout {value.layout} has no array "
                f"({one_line(error)}); expected a dense tensor of real numbers or booleans."
            ) from error
    if isinstance(value, np.ma.MaskedArray) and (count := int(np.ma.getmaskarray(value).sum())):
        raise DatasetError(
            f"{name}: {count} of {value.size} values are masked; expected numbers: leave those rows "
            "out, or fill the values."
        )
    if isinstance(value, list | tuple) and any(isinstance(row, torch.Tensor) for row in value):
        value = [array_of(row, name) if isinstance(row, torch.Tensor) else row for row in value]
    try:
        array = np.asarray(value)
    except ValueError:
        return np.full(len(value), None, object)
    if array.dtype == object and array.size and all(type(each) is int for each in array.flat):
        with suppress(OverflowError):
            return array.astype(np.int64)
    elif array.dtype.kind != "T":  # NumPy 2's text of any length
        return array
    return np.array(list(map(str, array.flat))).reshape(array.shape)  # also wide integers, as ids


def text_seconds(texts: Sequence[str]) -> NDArray[np.float64] | None:
    """Dates and times in ISO 8601 as seconds since 1970, UTC without a zone; None for other text."""
    found = [DATE.fullmatch(text) for text in texts]
    parts = [match.groups() for match in found if match]
    if not texts or len(parts) < len(found):
        return None
    try:
        times = np.array([f"{day}T{time or '00'}" for day, time, *_ in parts], "datetime64[us]")
    except ValueError:  # such as month 13
        return None
    zones = [
        int(f"{sign}1") * (60 * int(hours) + int(minutes or 0)) if sign else 0
        for *_, sign, hours, minutes in parts
    ]
    return times.astype(np.int64) / 1e6 - 60.0 * np.array(zones)
