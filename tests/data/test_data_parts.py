"""Columns whose rows lie in consecutive parts that are read together."""

import numpy as np
import pytest
from small_logs import refused

from iql_torchrl.data.readers.arrays import column_of_parts, columns_of_parts

LENGTHS = (0, 3, 0, 1, 4)
ROWS = np.arange(8)


class Reads:
    """The columns ``a`` and ``b`` of ``ROWS``; counts how often a part is read."""

    def __init__(self, **change):
        self.numbers, self.change = [], change

    def __call__(self, number):
        self.numbers.append(number)
        rows = np.split(ROWS, np.cumsum(LENGTHS))[number]
        part = {"a": rows.astype(np.int32), "b": np.stack([rows, -rows], 1) / 2}
        return {**part, **self.change} if number == 4 else part


@pytest.mark.parametrize(
    "rows", [slice(None), slice(2, 5), slice(3, 4), slice(5, 2), slice(-3, 99)]
)
def test_slices_are_those_of_the_joined_parts(rows):
    columns = columns_of_parts(LENGTHS, Reads())
    assert (columns["a"].shape, columns["a"].dtype) == ((8,), np.dtype(np.int32))
    assert (columns["b"].shape, columns["b"].dtype) == ((8, 2), np.dtype(np.float64))
    assert np.array_equal(columns["a"][rows], ROWS[rows])
    assert np.array_equal(columns["b"][rows], (np.stack([ROWS, -ROWS], 1) / 2)[rows])


def test_all_columns_of_a_slice_read_each_part_once():
    reads = Reads()
    columns = columns_of_parts(LENGTHS, reads)
    for rows in (slice(0, 2), slice(2, 5), slice(5, 8)):
        assert len(columns["a"][rows]) == len(columns["b"][rows]) == rows.stop - rows.start
    assert reads.numbers == [1, 3, 4]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("iql_torchrl.data.readers.arrays.KEPT_BYTES", 59)  # the first part has 60
    reads = Reads()
    columns = columns_of_parts(LENGTHS, reads)
    for _ in range(2):
        assert np.array_equal(columns["a"][:], ROWS)
    assert reads.numbers == [1, 3, 4, 1, 3, 4]
    reads = Reads()
    column = column_of_parts(LENGTHS, lambda number: reads(number)["a"], (), np.int32)
    assert np.concatenate([column[0:2], column[2:3], column[3:8], column[0:1]]).tolist() == [
        *ROWS,
        0,
    ]
    assert reads.numbers == [1, 3, 4, 1]


def test_text_of_any_length_is_complete():
    texts = [np.array(["go"]), np.array(["go to the door", "stop"])]
    column = columns_of_parts([1, 2], lambda number: {"mission": texts[number]})["mission"]
    assert column[:].tolist() == ["go", "go to the door", "stop"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros(4, np.int64), "log: a of episode 4|int64|expected (4,) and int32"),
        (np.zeros(3, np.int32), "log: a of episode 4|(3,)|expected (4,)"),
        (np.zeros((4, 1), np.int32), "(4, 1)|expected (4,)"),
    ],
)
def test_parts_of_another_shape_or_dtype_are_refused(values, words):
    columns = columns_of_parts(LENGTHS, Reads(a=values), "log")
    assert columns["a"][:4].tolist() == [0, 1, 2, 3]
    refused(words, slice(3, 5), columns["a"].__getitem__)


def test_a_missing_column_is_refused_and_narrower_numbers_are_not():
    columns = columns_of_parts([1, 1], lambda n: {"a": np.ones(1)} if n == 0 else {}, "log")
    refused("log: a of episode 1 is missing", slice(None), columns["a"].__getitem__)
    column = columns_of_parts(LENGTHS, Reads(b=np.ones((4, 2), np.float32)))["b"]
    assert column[4:].tolist() == [[1, 1]] * 4
    assert columns_of_parts([], Reads()) == {}
