"""What runs leave on disk: tables of metrics, written whole or not at all, and the folders."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

__all__ = [
    "EVALUATION",
    "TRAINING",
    "Run",
    "find_runs",
    "naming",
    "read_csv",
    "read_run",
    "whole_file",
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
)


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, float | int]]) -> None:
    """Replace ``path`` by one line per row; what a row lacks stays empty.

    Columns: ``update``, those of ``TRAINING`` and of ``EVALUATION`` that occur, then the others by
    name, so that a value which comes late moves no column. :func:`read_csv` gives every float
    back bit for bit.

    Raises ``ValueError`` naming row and column: no ``update >= 0``, a value that is no number, or
    a name that is empty, unprintable or framed by spaces.
    """
    names = {name for row in rows for name in row}
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not name:
            raise ValueError(
                f"column {name!r}: a name must be printable text without outer spaces."
            )
    known = [name for name in (*TRAINING, *EVALUATION) if name in names]
    header = ["update", *known, *sorted(names - {"update", *known})]
    lines = []
    for number, row in enumerate(rows):
        if not 0 <= row.get("update", -1) < math.inf:
            raise ValueError(f"row {number} needs an 'update', a finite number >= 0: {dict(row)}.")
        lines.append([_text(row[n], f"row {number}, {n!r}") if n in row else "" for n in header])
    with (
        whole_file(Path(path)) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *lines])


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows that :func:`write_csv` wrote; an empty cell is a key that the row lacks.

    Raises ``ValueError`` with path and line on a header without ``update`` in front or with a name
    twice, a line of another length, or a cell that is no number; ``OSError`` as ``open`` does.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_header(path, header)
            return [_row(path, reader.line_num, header, cells) for cells in reader if cells]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no table of metrics: {error}. Restore it, or remove it."
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside ``path``; what the block writes there replaces ``path`` if the block ends well.

    Raises ``OSError`` naming ``path`` where it cannot be written, as on a full disk; what was there
    before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path, instead_of=temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Let an ``OSError`` of the block name ``path``, where it names no file or ``instead_of``.

    Writing to a full disk raises an ``OSError`` without a file name.
    """
    try:
        yield
    except OSError as error:
        named = error.filename is not None and str(error.filename) != str(instead_of)
        if error.errno is None or named:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _text(value: object, place: str) -> str:
    if isinstance(value, Integral):
        return str(int(value))
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return repr(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{place} is {value!r}; wanted one number. Leave it out if there is none."
        ) from error


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if header[:1] != ["update"] or twice or "" in header:
        raise ValueError(
            f"{path} has the header {','.join(header)!r}; a table of metrics has named columns, "
            "each once, with 'update' first."
        )


def _row(path: Path, line: int, header: list[str], cells: list[str]) -> dict[str, float]:
    if len(cells) != len(header):
        raise ValueError(
            f"{path}, line {line}: {len(cells)} cells under {len(header)} columns. The file may be "
            "cut off: remove the line, or write the table again."
        )
    row = {}
    for name, cell in zip(header, cells, strict=True):
        try:
            if cell:
                row[name] = float(cell)
        except ValueError:
            raise ValueError(f"{path}, line {line}: {name} is {cell!r}, no number.") from None
    if not 0 <= row.get("update", -1.0) < math.inf:
        raise ValueError(f"{path}, line {line}: update is {cells[0]!r}; wanted a number >= 0.")
    return row


@dataclass(frozen=True)
class Run:
    """A run's folder as read: its settings (empty without ``config.json``) and its rows."""

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
    """Folders with a ``metrics.csv`` at or below each path, each once, in order of names.

    Nothing below a run is searched. Raises ``ValueError`` for a path that holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        before = len(found)
        again = False
        for place, folders, files in os.walk(path):
            folders.sort()
            if TABLE in files:
                folders.clear()
                again |= Path(place).resolve() in found
                found.setdefault(Path(place).resolve(), Path(place))
        if len(found) == before and not again:
            what = "holds no run" if path.is_dir() else "is no folder"
            raise ValueError(
                f"{path} {what}: give folders with a {TABLE}, or one above such folders."
            )
    return list(found.values())


def read_run(folder: Path) -> Run:
    """Raises ``ValueError`` when ``config.json`` is no JSON object or the table is broken."""
    path = folder / SETTINGS
    settings: Any = {}
    if path.exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}. Restore it, or remove it.") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"{path} holds {settings!r}; wanted an object with the run's settings."
            )
    return Run(folder, settings, read_csv(folder / TABLE))
