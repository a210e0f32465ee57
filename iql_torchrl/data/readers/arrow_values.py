"""Values of Arrow columns as arrays: numbers, lists of numbers, and pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["descend", "is_list", "leaves", "numbers", "one_array", "value_dtype"]


def leaves(kind: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of the fields of an Arrow type that hold values; ``[()]`` for a type without fields.

    Fields of structs are followed, also below one list; a struct of ``bytes`` and ``path``, as
    ``datasets.Image`` stores a picture, is one value.
    """
    import pyarrow as pa

    kind = _plain(kind)
    if pa.types.is_struct(kind) and not _is_picture(kind):
        return [leaf for field in kind for leaf in leaves(field.type, (*path, field.name))]
    if is_list(kind):
        inner = _plain(kind.value_type)
        if pa.types.is_struct(inner) and not _is_picture(inner):
            return [leaf for field in inner for leaf in leaves(field.type, (*path, field.name))]
    return [path]


def descend(array: Any, path: tuple[str, ...]) -> Any:
    """The field of ``array`` at a path of :func:`leaves`; lists of structs become lists of values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _storage(array)
    if not path:
        return array
    if pa.types.is_struct(array.type):
        return descend(pc.struct_field(array, path[0]), path[1:])
    if array.null_count:
        return pa.nulls(len(array), pa.list_(pa.float32()))
    lists = pa.LargeListArray if pa.types.is_large_list(array.type) else pa.ListArray
    if pa.types.is_fixed_size_list(array.type):
        values = descend(array.flatten(), path)
        return pa.FixedSizeListArray.from_arrays(values, array.type.list_size)
    return lists.from_arrays(array.offsets, descend(array.values, path))


def value_dtype(kind: Any, path: tuple[str, ...] = ()) -> np.dtype[Any]:
    """The dtype of the values at a path of an Arrow type; text for what are no numbers or pictures."""
    import pyarrow as pa

    kind = _plain(kind)
    while path or is_list(kind):
        if is_list(kind):
            kind = _plain(kind.value_type)
        else:
            kind, path = _plain(kind.field(path[0]).type), path[1:]
    if _is_picture(kind):
        return np.dtype(np.uint8)
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return np.dtype(np.str_)
    return np.dtype(kind.to_pandas_dtype())


def one_array(chunks: Any) -> Any:
    """A chunked array as one array, extension types as what they store."""
    import pyarrow as pa

    parts = [_storage(part) for part in chunks.chunks] if hasattr(chunks, "chunks") else [chunks]
    if len(parts) == 1:
        return parts[0]
    return pa.concat_arrays(parts) if parts else pa.array([], _plain(chunks.type))


def numbers(
    array: Any, name: str, *, folder: Path | None = None, first: int = 0, group: int = 1
) -> NDArray[Any]:
    """The values of an Arrow array, ``(length, ...)``: nested lists become dimensions.

    Pictures (PNG, JPEG, ... as bytes, or paths below ``folder``) are decoded to uint8 ``(height,
    width)`` or ``(height, width, channels)``.

    ``first``: the number of the first row, and ``group``: values per row, for messages that begin with
    ``name``. Raises ``DatasetError`` naming the row: empty values, lists of different lengths (no
    array has rows of different lengths), values that are neither numbers nor pictures, damaged
    pictures.
    """
    array = _storage(array)

    def row(place: int) -> int:
        return first + place // group

    if array.null_count and not _is_picture(array.type):
        place = int(np.flatnonzero(np.asarray(array.is_null()))[0])
        raise DatasetError(
            f"{name} has {array.null_count} empty values, first at row {row(place)}; expected "
            "numbers in every row: fill them, or leave those rows out."
        )
    if is_list(array.type):
        sizes = _sizes(array)
        size = int(sizes[0]) if len(sizes) else 0
        if len(wrong := np.flatnonzero(sizes != size)):
            raise DatasetError(
                f"{name} has lists of {size} and of {int(sizes[wrong[0]])} values, first at row "
                f"{row(int(wrong[0]))}; expected lists of one length, as an array has them."
            )
        inner = numbers(
            array.flatten(), name, folder=folder, first=first, group=group * max(size, 1)
        )
        return inner.reshape(len(array), size, *inner.shape[1:])
    if _is_picture(array.type):
        return _pictures(array, name, folder, row)
    if value_dtype(array.type).kind not in "biuf":
        raise DatasetError(
            f"{name} has values of the type {array.type}; expected numbers, lists of numbers or "
            "pictures."
        )
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _pictures(
    array: Any, name: str, folder: Path | None, row: Callable[[int], int]
) -> NDArray[np.uint8]:
    pictures = np.empty((len(array),), np.uint8)
    for place, item in enumerate(array):
        values = _picture(item.as_py(), f"{name} has", f"at row {row(place)}", folder)
        if not place:
            pictures = np.empty((len(array), *values.shape), np.uint8)
        if values.dtype != np.uint8 or values.shape != pictures.shape[1:]:
            raise DatasetError(
                f"{name} has a picture of shape {values.shape} and dtype {values.dtype} at row "
                f"{row(place)}; expected uint8 pictures of one shape, here {pictures.shape[1:]}: "
                "convert them."
            )
        pictures[place] = values
    return pictures


def _picture(item: Any, subject: str, place: str, folder: Path | None) -> NDArray[Any]:
    """One decoded picture; ``subject`` and ``place`` are parts of messages."""
    from PIL import Image

    data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, "")
    if data is None and path and folder is not None and (folder / path).is_file():
        data = (folder / path).read_bytes()
    if data is None:
        only = f", only the path {path!r}, where there is no file" if path else ""
        raise DatasetError(
            f"{subject} no picture {place}{only}; expected the bytes of a PNG or JPEG file in every "
            "row."
        )
    try:
        with Image.open(io.BytesIO(data)) as picture:
            # Palettes hold indices of colours, not colours.
            return np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(
            f"{subject} a damaged picture {place} ({one_line(error)}); repair or leave out that row."
        ) from error


def _plain(kind: Any) -> Any:
    """The type in which an extension type, such as ``datasets.Array2D``, is stored."""
    return getattr(kind, "storage_type", kind)


def _storage(array: Any) -> Any:
    return array.storage if hasattr(array.type, "storage_type") else array


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists, of equal lengths or not."""
    import pyarrow as pa

    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_picture(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in {field.name for field in kind}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _sizes(array: Any) -> NDArray[np.int64]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size, np.int64)
    return np.diff(np.asarray(array.offsets)).astype(np.int64)
