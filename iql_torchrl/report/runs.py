"""A run's folder as the report reads it: its table of metrics and its settings."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from iql_torchrl.files import whole_file

__all__ = [
    "EVALUATION",
    "TABLE",
    "TRAINING",
    "Run",
    "find_runs",
    "read_csv",
    "read_run",
    "write_csv",
]

TABLE, SETTINGS = "metrics.csv", "config.json"

TRAINING = (
    "loss_actor",
    "loss_qvalue",
    "loss_value",
    "entropy",
    "advantage_mean",
    "weight_mean",
    "weight_at_ceiling",
    "effective_sample_size",
    "qvalue_mean",
    "value_mean",
    "td_error_mean",
    "policy_value_gap",
)
EVALUATION = (
    "episodes",
    "return_mean",
    "return_standard_error",
    "return_min",
    "return_max",
    "return_low",
    "return_high",
    "length_mean",
    "score_mean",
    "score_standard_error",
    "score_low",
    "score_high",
    "success_rate",
    "success_low",
    "success_high",
    "chosen_value_gap",
)


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, float | int]]) -> None:
    """Replace ``path`` by a table with one line per row; a column that a row lacks stays empty.

    Columns: ``update``, those of ``TRAINING`` and of ``EVALUATION`` that occur, then the others in
    alphabetical order, so that the order does not depend on when a value is first recorded.
    :func:`read_csv` returns every float with the same bits.

    Raises ``ValueError`` naming row and column: no ``update >= 0``, a value that is not a number,
    or a column name that is empty, unprintable or surrounded by spaces.
    """
    names = {name for row in rows for name in row}
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not name:
            raise ValueError(
                f"column {name!r}: a name must be printable text without outer spaces."
            )
    known = [name for name in (*TRAINING, *EVALUATION) if name in names]
    header = ["update", *known, *sorted(names - {"update", *known})]
    for number, row in enumerate(rows):
        if not 0 <= row.get("update", -1) < math.inf:
            raise ValueError(f"row {number} needs an 'update', a finite number >= 0: {dict(row)}.")
    lines = [
        {name: _text(value, f"row {number}, {name!r}") for name, value in row.items()}
        for number, row in enumerate(rows)
    ]
    with (
        whole_file(Path(path)) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows that :func:`write_csv` wrote; an empty cell is a key that the row lacks.

    Raises ``ValueError`` with path and line on a header that does not start with ``update`` or
    repeats a name, a line of another length, or a cell that is not a number; ``OSError`` as
    ``open`` does.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, list(reader.fieldnames or ()))
            return [_row(path, reader.line_num, cells) for cells in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a table of metrics: {error}. Restore it, or remove it."
        ) from error


def _text(value: object, place: str) -> str:
    if isinstance(value, Integral):
        return str(int(value))
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return repr(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{place} is {value!r}; expected one number. Leave the key out if there is no value."
        ) from error


def _check_header(path: Path, header: list[str]) -> None:
    repeated = len(set(header)) < len(header)
    if header[:1] != ["update"] or repeated or "" in header:
        raise ValueError(
            f"{path} has the header {','.join(header)!r}; a table of metrics has named columns, "
            "each once, with 'update' first."
        )


def _row(path: Path, line: int, cells: dict[str | Any, str | Any]) -> dict[str, float]:
    extra = cells.pop(None, [])  # csv.DictReader's key for cells beyond the header's columns
    count = len(extra) + sum(cell is not None for cell in cells.values())
    if extra or count < len(cells):
        raise ValueError(
            f"{path}, line {line}: {count} cells under {len(cells)} columns. The file may be "
            "truncated: remove the line, or write the table again."
        )
    row = {}
    for name, cell in cells.items():
        try:
            if cell:
                row[name] = float(cell)
        except ValueError:
            raise ValueError(f"{path}, line {line}: {name} is {cell!r}, not a number.") from None
    if not 0 <= row.get("update", -1.0) < math.inf:
        raise ValueError(
            f"{path}, line {line}: update is {cells['update']!r}; expected a number >= 0."
        )
    return row


@dataclass(frozen=True)
class Run:
    """A run's folder: its settings (empty without ``config.json``) and the rows of its table."""

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def updates(self) -> float:
        """The last update that has a row; -1 without rows."""
        return max((row["update"] for row in self.rows), default=-1.0)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders with a ``metrics.csv`` at or below each path, each once, sorted by name.

    Folders inside a run's folder are not searched. Raises ``ValueError`` for a path without a run.
    """
    runs: dict[Path, Path] = {}  # by resolved path, so that no run is listed twice
    for path in paths:
        empty = True
        for parent, folders, files in os.walk(path):
            folders.sort()
            if TABLE in files:
                folders.clear()
                empty = False
                runs.setdefault(Path(parent).resolve(), Path(parent))
        if empty:
            problem = "contains no run" if path.is_dir() else "is not a folder"
            raise ValueError(
                f"{path} {problem}: give folders with a {TABLE}, or a folder that contains them."
            )
    return list(runs.values())


def read_run(folder: Path) -> Run:
    """Raises ``ValueError`` when ``config.json`` is not a JSON object or the table is damaged."""
    path = folder / SETTINGS
    settings: Any = {}
    if path.exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}. Restore it, or remove it.") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"{path} contains {settings!r}; expected an object with the run's settings."
            )
    return Run(folder, settings, read_csv(folder / TABLE))
