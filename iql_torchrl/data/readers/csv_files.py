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


def open_csv(path: Path) -> dict[str, Column]:
    """The columns of a file of steps, named by its first line; ``a.0``, ``a.1``, ... are one array.

    Arrays of whole numbers have integers, as categories must; ``True`` and ``False`` are 1 and 0.
    Raises ``DatasetError`` for a line of another length, and for a cell that is no number at the
    first use of its array.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        head, *rows = [line for line in csv.reader(file) if line] or [[""]]
    for row, line in enumerate(rows):
        if len(line) != len(head):
            raise DatasetError(f"{path}: row {row} has {len(line)} cells; expected {len(head)}.")
    table = np.array(rows, object).reshape(-1, len(head))
    table[table == "True"], table[table == "False"] = "1", "0"
    arrays = [re.sub(r"\.\d+$", "", name) for name in head]
    columns: dict[str, Column] = {}
    for array in dict.fromkeys(arrays):
        cells = table[:, [place for place, name in enumerate(arrays) if name == array]]
        columns[array.replace(".", "/")] = _numbers(cells[:, 0] if array in head else cells, path)
    return columns


def _numbers(cells: NDArray[Any], path: Path) -> Column:
    whole = all(re.fullmatch(r"-?\d{1,18}", cell) for cell in cells.flat)
    numbers = np.empty(cells.shape, np.int64 if whole else np.float64)
    for row, values in enumerate(cells):
        try:
            numbers[row] = values
        except ValueError as error:
            return UnreadableColumn(f"{path}: row {row}: {error}; expected a number.")
    return numbers
