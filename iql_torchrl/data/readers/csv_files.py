"""Tables in CSV files."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, UnreadableColumn
from iql_torchrl.data.schema import DatasetError

MARKS = {"true": "1", "false": "0"}


def open_csv(path: Path) -> dict[str, Column]:
    """The columns of a file of steps, named by its first line; ``a.0``, ``a.1``, ... are one array.

    The number in a name is the place in the array, wherever the column stands. Arrays of whole numbers
    have integers, as categories must; true and false are 1 and 0, in letters of any case.

    Raises ``DatasetError`` for columns that occur twice or leave places out, for a line of another
    length, and for a cell that is no number at the first use of its array.
    """
    # "-sig": spreadsheets write a mark of byte order, which is no part of the first name
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            lines = csv.reader(file, skipinitialspace=True)
            head, *rows = [line for line in lines if line] or [[""]]
        except csv.Error as error:
            raise DatasetError(f"{path} is not a table of numbers: {error}.") from error
    for row, line in enumerate(rows):
        if len(line) != len(head):
            raise DatasetError(f"{path}: row {row} has {len(line)} cells; expected {len(head)}.")
    table = np.array(rows, object).reshape(-1, len(head))
    arrays: dict[str, dict[int, int]] = {}  # by name, the column of the file of each place
    for column, name in enumerate(head):
        array, _, place = name.rpartition(".") if re.search(r"\.\d+$", name) else (name, "", "-1")
        if arrays.setdefault(array, {}).setdefault(int(place), column) != column:
            raise DatasetError(f"{path}: the column {name!r} occurs twice; remove or rename one.")
    columns: dict[str, Column] = {}
    for array, places in arrays.items():
        if sorted(places) not in ([-1], list(range(len(places)))):
            raise DatasetError(
                f"{path}: the columns of {array!r} are {', '.join(head[c] for c in places.values())}; "
                f"expected {array}, or {array}.0, {array}.1 and so on without a gap."
            )
        order = [places[place] for place in sorted(places)]
        cells = table[:, order[0] if -1 in places else order]
        columns[array.replace(".", "/")] = _numbers(cells, f"{path}, column {array!r}")
    return columns


def _numbers(cells: NDArray[Any], name: str) -> Column:
    texts = [MARKS.get(cell.strip().lower(), cell.strip()) for cell in cells.flat]
    if all(re.fullmatch(r"-?\d{1,20}", text) for text in texts):
        whole = np.array(list(map(int, texts)))
        if whole.dtype.kind in "iu":  # of 64 bits: floats would make large numbers equal
            return whole.reshape(cells.shape)
    numbers = np.empty(cells.size)
    for place, text in enumerate(texts):
        try:
            numbers[place] = text
        except ValueError as error:
            row = place * len(cells) // cells.size
            return UnreadableColumn(f"{name}, row {row}: {error}; expected a number.")
    return numbers.reshape(cells.shape)
