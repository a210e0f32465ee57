"""Tables in JSON files, of one object for each step or episode, and arrays in npy files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.data.readers.arrays import Column, Columns, flatten, package, reading, text_seconds
from iql_torchrl.data.readers.frames import open_cells, open_table
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError

#: Integers that pyarrow may read as floats, which makes different ids equal.
WIDE_INTEGER = re.compile(rb"(?<![\d.\"])-?\d{19,}(?![\d.eE])")
#: About how many bytes pyarrow reads together; no object may be larger.
BLOCK_BYTES = 2**24
LINES = (".jsonl", ".ndjson")
EXPECTED = "expected a list of objects, or one object a line, with one value for each column"


def open_json(path: Path, options: ReadOptions) -> Columns:
    """The columns of a list of objects, or of one object a line. The file is read whole.

    An object is a step, or an episode where its reward is a list, as ``readers.arrow`` reads them;
    RLlib's sample batches are such objects. A file of one object has columns: lists of one value for
    each step, or the objects of numbered rows that pandas writes.

    Raises ``DatasetError`` naming a damaged line, for other contents, and for observations that RLlib
    compressed.
    """
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    first, _, others = data.partition(b"\n")
    try:
        lines = path.suffix.lower() in LINES or (isinstance(json.loads(first), dict) and others)
    except ValueError:
        lines = False
    if lines:
        _check_batch(path, first)
        wide = WIDE_INTEGER.search(data)
        columns = None if wide else _read_by_arrow(path.name, data, options.named)
        if columns is not None:
            return columns
        texts = enumerate(data.decode(errors="replace").split("\n"), 1)
        values: Any = [_value(path, t, f" in line {line}") for line, t in texts if t.strip()]
    else:
        values = _value(path, data, "")
    if isinstance(values, dict):
        for name, column in values.items():  # pandas writes a column by the names of its rows
            inner = list(column.values()) if isinstance(column, dict) else None
            if inner is not None and not any(isinstance(v, dict | list) for v in inner):
                values[name] = inner
        return Columns(path.name, flatten(values), text=True)
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise DatasetError(f"{path}: has other values than objects; {EXPECTED}.")
    names = dict.fromkeys(name for row in values for name in row)
    cells: dict[str, Any] = {name: [row.get(name) for row in values] for name in names}
    for name, column in cells.items():
        if all(isinstance(cell, str) for cell in column):
            seconds = text_seconds(column)  # as pyarrow reads them
            cells[name] = column if seconds is None else seconds
    return replace(open_cells(path.name, cells, options.named), text=True)


def _read_by_arrow(name: str, data: bytes, mapping: Mapping[str, str | None]) -> Columns | None:
    """None for what ``json`` must read or refuse, such as numbers and text in one column."""
    pa, arrow_json = package("pyarrow", name), package("pyarrow.json", name)
    options = arrow_json.ReadOptions(block_size=BLOCK_BYTES)
    try:
        table = arrow_json.read_json(io.BytesIO(data), options)
    except pa.ArrowInvalid:
        return None
    return replace(open_table(name, table, mapping), text=True)


def _value(path: Path, text: bytes | str, place: str) -> Any:
    with reading(path, f"not complete JSON{place}", ValueError):
        return json.loads(text)


def _check_batch(path: Path, first: bytes) -> None:
    """Raises for batches of RLlib that cannot be read, by the first line."""
    try:
        batch = json.loads(first)
    except ValueError:
        return
    kind = batch.get("type") if isinstance(batch, dict) else None
    if kind == "MultiAgentBatch":
        raise DatasetError(
            f"{path}: has batches of several agents; expected those of one: write the sample batch of "
            "each policy to a file of its own."
        )
    if kind == "SampleBatch" and any(isinstance(batch.get(k), str) for k in ("obs", "new_obs")):
        raise DatasetError(
            f"{path}: RLlib compressed the observations; write them as numbers, with "
            "output_compress_columns=[] in the config's offline_data()."
        )


def open_npy(path: Path) -> dict[str, Column]:
    """The fields of a structured array, memory-mapped.

    Raises ``DatasetError`` for a damaged file, an array without names, and Python objects, which are
    never unpickled.
    """
    remedy = (
        "expected a structured array with a field for each column, or an .npz archive of arrays"
    )
    with open(path, "rb") as file:
        pickled = file.read(1) == b"\x80"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if pickled or "object" in str(error):
            raise DatasetError(
                f"{path}: has Python objects, which are not unpickled, as a file can run any code; "
                f"{remedy}: if you made the file, pass np.load(path, allow_pickle=True).item()."
            ) from error
        with reading(path, "not a complete npy file", OSError, ValueError, EOFError):
            raise
    if array.dtype.names is None or array.ndim != 1:
        raise DatasetError(
            f"{path}: has an array of shape {array.shape} and dtype {array.dtype} without names; "
            f"{remedy}, as numpy.savez(path, observation=..., action=...) writes it."
        )
    return flatten({name: array[name] for name in array.dtype.names})
