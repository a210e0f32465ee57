"""Tables in CSV files."""

from __future__ import annotations

import csv
import io
import re
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    ComputedColumn,
    UnreadableColumn,
    reading,
    text_seconds,
)
from iql_torchrl.data.schema import DatasetError

DELIMITERS = ",;\t|"
BOOLEANS = {"true": "1", "false": "0"}
MISSING = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None")
INTEGER = re.compile(r"-?\d{1,20}")
NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf(inity)?)", re.IGNORECASE)
DECIMAL_COMMA = re.compile(rb'[;"\n\r] *[-+]?\d*,\d+(e[-+]?\d+)? *[;"\n\r]', re.IGNORECASE)
#: Between tabs a comma may also group thousands: three digits say nothing, a decimal dot denies it.
COMMA_OF_TABS = re.compile(rb'[\t"\n\r] *[-+]?\d*,(\d\d?|\d{4,}) *[\t"\n\r]')
DOT_OF_TABS = re.compile(rb'[\t"\n\r] *[-+]?[\d,]*\.\d+ *[\t"\n\r]')
LIST = re.compile(r"\[[^\[\]]*\]")
#: A tuple of numbers, as Python writes it, also of NumPy's.
NUMPY_NUMBER = re.compile(r"np\.\w+\(([^()]*)\)")
TUPLE = re.compile(r"\(([-+.\deE]+, ?)+([-+.\deE]+)?\)")
#: pyarrow reads integers of more than 64 bits as floats, at least of this size.
LARGE = 2.0**63
#: Texts up to this length are stored in one size for all of a column.
SHORT = 64


def open_csv(path: Path) -> Columns:
    """The columns of a file of steps, named by its first line. The file is read whole.

    The delimiter is the one of ``DELIMITERS`` that divides the first line most often; with a semicolon
    or a tab, numbers may have decimal commas (a note). Columns become booleans (1 and 0 if mixed),
    integers, floats, vectors (of cells such as ``[0.5, 1]``), seconds (of dates and times in ISO 8601),
    or text. Integers of more than 64 bits are floats, but text where they are ids. Cells of
    ``MISSING`` are NaN. Columns without a name are left out, such as R's names of rows. pyarrow
    reads numbers if it is installed, with the same result.

    Raises ``DatasetError`` for an empty file, a first line of numbers, a name that occurs twice, and a
    line of another length; and at the first use of a column of text for an empty cell.
    """
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # spreadsheets' "Unicode text" is UTF-16
        data = data.decode("utf-16", errors="replace").encode()
    data = data.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")
    if given := re.match(rb"sep=.\r?\n", data):  # which spreadsheets read
        data = data[given.end() :]
    first = re.split(r"[\r\n]", data[: 2**20].decode(errors="replace"), maxsplit=1)[0]
    delimiter = max(DELIMITERS, key=lambda each: len(_lines(path, first, each)[0]))
    head = _lines(path, first, delimiter)[0]
    _check_names(path, head)
    comma = delimiter == ";" and DECIMAL_COMMA.search(data) is not None
    if delimiter == "\t" and not DOT_OF_TABS.search(data):
        comma = COMMA_OF_TABS.search(data) is not None
    subjects = [f"{path}, column {name!r}" for name in head]
    columns = _read_by_arrow(data, subjects, delimiter, comma)
    if columns is None:
        lines = _lines(path, data.decode(errors="replace"), delimiter)[1:]
        if not lines:
            raise DatasetError(
                f"{path}: has names and no rows; expected one row per step below them."
            )
        for row, line in enumerate(lines):
            if len(line) != len(head):
                remedy = "correct that line"
                if all(len(each) == len(head) + 1 for each in lines):
                    remedy = "name the first column too (R: write.csv, or col.names=NA)"
                raise DatasetError(
                    f"{path}: row {row} has {len(line)} cells; expected {len(head)}, as many as the "
                    f"first line has names ({delimiter!r} is the delimiter): {remedy}."
                )
        columns = [
            _column([line[place] for line in lines], subject, comma)
            for place, subject in enumerate(subjects)
        ]
    notes = ("commas in numbers were read as decimal commas: 0,5 is 0.5.",) if comma else ()
    named = {name: column for name, column in zip(head, columns, strict=True) if name}
    return Columns(path.name, named, notes=notes, text=True)


def _lines(path: Path, text: str, delimiter: str) -> list[list[str]]:
    """The cells of lines that are not empty; one empty cell if there are none."""
    # newline="": a cell in quotation marks may have several lines
    file = io.StringIO(text, newline="")
    with reading(path, "is not a table of numbers", csv.Error):
        lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        return [line for line in lines if line] or [[""]]


def _check_names(path: Path, head: list[str]) -> None:
    names = [name for name in head if name]
    if not names:
        raise DatasetError(
            f"{path}: is empty; expected a first line of names, and one row per step."
        )
    numbers = [n for n in names if NUMBER.fullmatch(n.strip().replace(",", "."))]
    # pandas numbers the columns of an array from 0 on
    if 2 * len(numbers) > len(names) and numbers != list(map(str, range(len(names)))):
        raise DatasetError(
            f"{path}: its first line is {', '.join(names[:4])}{', ...' * (len(names) > 4)}; expected "
            "names of columns: put a first line of names above the numbers, such as "
            "observation.0,observation.1,action,reward,terminated."
        )
    for name in names:
        if names.count(name) > 1:
            raise DatasetError(f"{path}: the column {name!r} occurs twice; remove or rename one.")


def _read_by_arrow(
    data: bytes, subjects: list[str], delimiter: str, comma: bool
) -> list[Column] | None:
    """The columns; None without pyarrow, and for what ``csv`` must read or refuse."""
    try:
        pa, arrow_csv = import_module("pyarrow"), import_module("pyarrow.csv")
    except ImportError:
        return None
    names = list(map(str, range(len(subjects))))

    def read(**options: Any) -> Any:
        return arrow_csv.read_csv(
            pa.BufferReader(data),
            arrow_csv.ReadOptions(column_names=names, skip_rows_after_names=1),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=b'"' in data),
            arrow_csv.ConvertOptions(**options),
        )

    words = {f"{word}_values": [word, word.capitalize(), word.upper()] for word in BOOLEANS}
    columns: dict[str, Column] = {}
    try:
        table = read(null_values=MISSING, decimal_point="," if comma else ".", **words)
        if not table.num_rows or f'{delimiter} "'.encode() in data:
            return None
        for name in names:
            values = table.column(name)
            kind = str(values.type)
            if kind in ("int64", "double", "null") or (kind == "bool" and not values.null_count):
                numbers = values.cast(pa.float64()) if kind == "null" else values
                columns[name] = array = numbers.to_numpy()
                if kind == "double" and (np.abs(array) >= LARGE).any():
                    del columns[name]
        rest = [name for name in names if name not in columns]
        texts = dict.fromkeys(rest, pa.binary())
        # again, as pyarrow guesses times and changes large numbers
        table = read(column_types=texts, include_columns=rest, null_values=[]) if rest else table
    except pa.ArrowInvalid:
        return None
    for name in rest:
        cells = [cell.decode(errors="replace") for cell in table.column(name).to_pylist()]
        columns[name] = _column(cells, subjects[int(name)], comma)
    return [columns[name] for name in names]


def _column(cells: list[str], subject: str, comma: bool) -> Column:
    """The values of a column of cells."""
    every = "".join(cells)
    if not comma and not set(every) & set("_+"):  # in all but rare columns of numbers
        kind, convert = (np.float64, float) if set(every) & set(".eEiInN") else (np.int64, int)
        with suppress(ValueError, OverflowError):
            return np.array(list(map(convert, cells)), kind)
    places: dict[str, int] = {}
    inverse = np.array([places.setdefault(cell, len(places)) for cell in cells])
    distinct = [cell.strip() for cell in places]
    known = np.array([cell not in MISSING for cell in distinct])
    texts = [cell for cell in distinct if cell not in MISSING]
    values = _values(texts, comma)
    if values.dtype.kind not in "OU":
        if not known.all():
            numbers = np.full((len(known), *values.shape[1:]), np.nan)
            numbers[known] = values
            values = numbers
        rows = values[inverse]
        if (
            rows.dtype.kind == "f"
            and known.all()
            and all(text.lstrip("-").isdecimal() for text in texts)
        ):
            return ComputedColumn(
                rows.shape, rows.dtype, rows.__getitem__, np.array(texts)[inverse]
            )
        return rows
    if texts[0][:1] == "[" and all(map(LIST.fullmatch, texts)):
        return UnreadableColumn(
            f"{subject} has lists such as {texts[0]!r} of different lengths, or with '...' for values "
            "that were left out; expected a column for each number, such as observation.0."
        )
    if not known.all():
        row = int((~known)[inverse].argmax())
        return UnreadableColumn(
            f"{subject}, row {row}: {cells[row]!r} is a missing value in a column of text; expected "
            "text in every row: fill it, or leave the row out."
        )
    return values[inverse]


def _values(texts: list[str], comma: bool) -> NDArray[Any]:
    """Booleans, integers, floats ``(N,)`` or ``(N, k)``, or the texts as they are."""
    if texts and all(text.lower() in BOOLEANS for text in texts):
        return np.array([text.lower() == "true" for text in texts])
    plain = [NUMPY_NUMBER.sub(r"\1", text) for text in texts] if texts else []
    if plain and all(map(TUPLE.fullmatch, plain)):
        texts = [text.replace("(", "[").replace(",)", "]").replace(")", "]") for text in plain]
    if texts and all(map(LIST.fullmatch, texts)):
        rows = [re.split(r"[,\s]+", text[1:-1].strip()) for text in texts]
        if len({len(row) for row in rows}) == 1:
            inner = _values([cell for row in rows for cell in row], comma=False)
            return inner.reshape(len(rows), -1)
    # a dot groups thousands where commas are decimal: such a cell is not read as a number
    cells = [text.replace(".", " ").replace(",", ".") for text in texts] if comma else texts
    cells = [BOOLEANS.get(cell.lower(), cell) for cell in cells]
    if all(map(INTEGER.fullmatch, cells)):
        for kind in (np.int64, np.uint64):  # floats would make large numbers equal
            with suppress(OverflowError):
                return np.array(list(map(int, cells)), kind)
    if all(map(NUMBER.fullmatch, cells)):
        return np.array(list(map(float, cells)))
    if (seconds := text_seconds(texts)) is not None:
        return seconds
    return np.array(texts, None if max(map(len, texts)) <= SHORT else object)
