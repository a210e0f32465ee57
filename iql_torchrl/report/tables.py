"""Tables of runs: the file of metrics, and tables in text."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from iql_torchrl.data import OfflineDataset
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.statistics import standard_error
from iql_torchrl.files import atomic_write
from iql_torchrl.losses import DDPGBC, DIAGNOSTICS, LOSSES

WIDEST_LABEL = 48
TRAINING = (*LOSSES, "entropy", *DIAGNOSTICS, *(name for _, name in DDPGBC.diagnostics))
EVALUATION = (
    "episodes",
    *(f"return_{each}" for each in ("mean", "standard_error", "min", "max", "low", "high")),
    "length_mean",
    *(f"score_{each}" for each in ("mean", "standard_error", "low", "high")),
    *("success_rate", "success_low", "success_high"),
    "chosen_value_gap",
)


def decimals(values: Iterable[float]) -> int:
    """Decimal places of all numbers of a column, by the largest of them."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 1 if largest >= 100 else 2 if largest >= 10 else 3 if largest >= 1 else 4


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first aligned on the left; a long label has its own line."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    above = widths[0] > WIDEST_LABEL
    text = []
    for label, *cells in rows:
        if above and label:
            text.append(label)
        lead = " " * 4 if above else label.ljust(widths[0])
        text.append("  ".join([lead, *map(str.rjust, cells, widths[1:])]).rstrip())
    return "\n".join(text)


def results_table(dataset: OfflineDataset, results: Mapping[str, Evaluation]) -> str:
    """One line for the dataset, then one for each entry of ``results``, by name.

    Columns: mean of the undiscounted returns, its standard error (``-`` for one episode), number of
    episodes; and the normalised score of the mean, 0 to 100, if the dataset has reference scores.
    """
    returns = {"the dataset": dataset.episode_returns}
    returns |= {name: result.returns for name, result in results.items()}
    scored = dataset.reference_scores is not None
    rows = [["", "mean return", "std. error", "episodes", *["score 0..100"] * scored]]
    for name, values in returns.items():
        mean, error = float(values.mean()), standard_error(values)
        score = [f"{float(dataset.normalised_score(mean)):.1f}"] if scored else []
        shown = "-" if math.isnan(error) else f"{error:.1f}"
        rows.append([name, f"{mean:.1f}", shown, str(len(values)), *score])
    return text_table(rows)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace ``path`` by a CSV table with one line per row; its folder is made where it is missing.

    The header has the keys of all rows in the order of their first occurrence. A cell is the text of
    its value; it is empty for NaN, for None and for a key that the row lacks.

    Raises ``OSError`` naming ``path`` where it cannot be written; what was there then stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    _write(path, names, [{name: None if v != v else v for name, v in r.items()} for r in rows])


def _write(path: Path, names: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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
    lines = []
    for number, row in enumerate(rows):
        if not 0 <= row.get("update", -1) < math.inf:
            raise ValueError(f"row {number} needs an 'update', a finite number >= 0: {dict(row)}.")
        lines.append({name: _number(x, f"row {number}, {name!r}") for name, x in row.items()})
    known = [name for name in (*TRAINING, *EVALUATION) if name in names]
    _write(Path(path), ["update", *known, *sorted(names - {"update", *known})], lines)


def _number(value: Any, place: str) -> int | float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return int(value) if isinstance(value, Integral) else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{place} is {value!r}; expected one number. Leave the key out if there is no value."
        ) from error


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows that :func:`write_csv` wrote; an empty cell is a key that the row lacks.

    Raises ``ValueError`` with path and line on a header that does not start with ``update`` or
    repeats a name, a line of another length, or a cell that is not a number; ``OSError`` as
    ``open`` does.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if header[:1] != ["update"] or len(set(header)) < len(header) or "" in header:
                raise ValueError(
                    f"{path} has the header {','.join(header)!r}; a table of metrics has named "
                    "columns, each once, with 'update' first."
                )
            return [_row(f"{path}, line {reader.line_num}", header, c) for c in reader if c]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a table of metrics: {error}. Restore it, or remove it."
        ) from error


def _row(place: str, header: Sequence[str], cells: Sequence[str]) -> dict[str, float]:
    if len(cells) != len(header):
        raise ValueError(
            f"{place}: {len(cells)} cells under {len(header)} columns. The file may be truncated: "
            "remove the line, or write the table again."
        )
    row = {}
    for name, cell in zip(header, cells, strict=True):
        try:
            if cell:
                row[name] = float(cell)
        except ValueError:
            raise ValueError(f"{place}: {name} is {cell!r}, not a number.") from None
    if not 0 <= row.get("update", -1.0) < math.inf:
        raise ValueError(f"{place}: update is {cells[0]!r}; expected a number >= 0.")
    return row
