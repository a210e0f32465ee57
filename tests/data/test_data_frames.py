"""Tables in memory: DataFrames of pandas and polars, tables of pyarrow, relations of DuckDB."""

import datetime
import sys
from itertools import pairwise

import numpy as np
import pytest
from extras import needs
from small_logs import UNEQUAL as LENGTHS
from small_logs import assert_counted, counted, refused, step_table

from iql_torchrl.data import load_dataset
from iql_torchrl.data.readers.arrays import UnreadableColumn
from iql_torchrl.data.readers.frames import open_frame

pa, pd = needs("pyarrow"), needs("pandas")
KEYS = ("observation", "action", "reward", "terminated")


def read(source):
    return open_frame(source, {}).columns


def table(kind, rows):
    if kind == "polars":
        return pytest.importorskip("polars").DataFrame(rows)
    if kind == "lazy":
        return pytest.importorskip("polars").LazyFrame(rows)
    if kind == "duckdb":
        return pytest.importorskip("duckdb").from_arrow(pa.table(rows))
    if kind == "pyarrow":
        return pa.table(rows)
    if kind == "batches":
        return pa.table(rows).to_reader(max_chunksize=3)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("kind", ["pandas", "polars", "lazy", "duckdb", "pyarrow", "batches"])
def test_tables_in_memory_are_read_as_files_are(kind):
    dataset = load_dataset(table(kind, step_table()))
    assert_counted(dataset, LENGTHS, [1])
    assert dataset.name == type(table(kind, step_table())).__name__


@pytest.mark.parametrize("arrow", [True, False])
def test_columns_of_pandas(arrow, monkeypatch):
    """The same values with pyarrow, and without it by NumPy."""
    vectors, pictures = np.arange(6.0).reshape(3, 2), np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    frame = pd.DataFrame(
        {
            "vector": list(vectors),
            "picture": list(pictures),
            "pair": [(1, 2), (3, 4), (5, 6)],
            "time": pd.to_datetime(["1970-01-02", "1970-01-01 00:00:01.5", None], format="ISO8601"),
            "zone": pd.to_datetime(["1970-01-01"] * 3).tz_localize("Europe/Berlin"),
            "after": pd.to_timedelta([1, 2, 3], unit="min"),
            "number": [0.5, np.nan, 2],
            "flag": [True, False, True],
            "text": ["b", "a", "b"],
            "category": pd.Categorical(["x", "y", "x"]),
            "ragged": [np.ones(1), np.ones(2), np.ones(1)],
        }
    )
    frame["next"] = frame["vector"].shift(-1)  # NaN, not an array, in the last row
    if not arrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    columns = read(frame)
    expected = {
        "vector": vectors, "picture": pictures, "pair": np.array([[1, 2], [3, 4], [5, 6]]),
        "time": [86400, 1.5, np.nan], "zone": [-3600.0] * 3, "after": [60.0, 120, 180],
        "number": [0.5, np.nan, 2], "flag": np.array([True, False, True]),
        "text": np.array(["b", "a", "b"], object), "category": np.array(["x", "y", "x"], object),
        "next": [[2.0, 3], [4, 5], [np.nan, np.nan]],
    }  # fmt: skip
    for name, values in expected.items():
        assert columns[name].dtype == np.asarray(values).dtype, name
        assert columns[name].shape == np.shape(values)
        if np.asarray(values).dtype == object:
            assert columns[name][:].tolist() == values.tolist()
        else:
            assert np.array_equal(columns[name][:], values, equal_nan=columns[name].dtype == float)
    refused("ragged", columns["ragged"], lambda column: column[:] if column.shape else None)


def test_names_and_index_of_pandas():
    frame = pd.DataFrame(step_table(), index=range(50, 61))
    assert_counted(load_dataset(frame), LENGTHS, [1])  # an index without a name is not a column
    assert_counted(load_dataset(frame.set_index("episode_index")), LENGTHS, [1])
    frame.columns = pd.MultiIndex.from_tuples([("a", name) for name in frame.columns])
    assert set(read(frame)) == {f"a/{name}" for name in step_table()}
    twice = pd.concat([pd.DataFrame(step_table()), pd.DataFrame({"reward": [0.0] * 11})], axis=1)
    refused("DataFrame: the column 'reward' occurs twice", twice)


def test_rows_of_episodes():
    """Decision Transformer's layout: each cell has the steps of an episode, with its own length."""
    begins = np.cumsum((0, *LENGTHS))
    rows = counted(*LENGTHS, terminated=[1])
    cells = {key: [rows[key][a:b] for a, b in pairwise(begins)] for key in KEYS}
    assert_counted(load_dataset(pd.DataFrame(cells)), LENGTHS, [1])


def test_missing_values_matter_only_where_they_are_used():
    """A missing float is NaN, a missing vector a row of NaN; integers and text name the row."""
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(
        {
            "float": [None, 1.5],
            "vector": polars.Series([None, [1.0, 2.0]], dtype=polars.Array(polars.Float32, 2)),
            "list": [[1.0, 2.0], None],
            "integer": [1, None],
            "text": ["a", None],
        }
    )
    columns = read(frame)
    assert np.array_equal(columns["float"][:], [np.nan, 1.5], equal_nan=True)
    for name, kind, expected in (
        ("vector", np.float32, [[np.nan] * 2, [1, 2]]),
        ("list", np.float64, [[1, 2], [np.nan] * 2]),
    ):
        assert columns[name].dtype == kind
        assert np.array_equal(columns[name][:], np.array(expected), equal_nan=True)
    for name in ("integer", "text"):
        refused(
            f"DataFrame: {name} has 1 empty values, first at row 1", columns[name], lambda c: c[:]
        )
    assert_counted(load_dataset(pd.DataFrame(step_table(note=[None] * 10 + ["a"]))), LENGTHS, [1])


def test_types_of_databases():
    """Decimals become floats, dates and times seconds, enumerations text; the rest is unreadable."""
    duckdb = pytest.importorskip("duckdb")
    columns = read(
        duckdb.sql(
            "SELECT 0.5 AS decimal, DATE '1970-01-03' AS day, TIME '00:01:02' AS time, "
            "TIMESTAMP '1970-01-01 00:00:00.25' AS moment, 'x'::ENUM('x', 'y') AS kind, "
            "[1.0, 2.0]::DOUBLE[2] AS vector, INTERVAL 1 DAY AS interval, 'a' AS text"
        )
    )
    found = {name: c[:].tolist() for name, c in columns.items() if name != "interval"}
    assert found == {
        "decimal": [0.5], "day": [2 * 86400.0], "time": [62.0], "moment": [0.25], "kind": ["x"],
        "vector": [[1.0, 2.0]], "text": ["a"],
    }  # fmt: skip
    assert isinstance(columns["interval"], UnreadableColumn)
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"lasts": [datetime.timedelta(seconds=1.5)], "kind": ["x"]})
    columns = read(frame.with_columns(polars.col("kind").cast(polars.Categorical)))
    assert (columns["lasts"][:].tolist(), columns["kind"][:].tolist()) == ([1.5], ["x"])


def test_mixed_columns_and_other_objects():
    frame = pd.DataFrame(step_table(mixed=[1, "a"] + [None] * 9, other=[object()] * 11))
    assert_counted(load_dataset(frame), LENGTHS, [1])
    refused("DataFrame: mixed cannot be read|several kinds", read(frame)["mixed"], lambda c: c[:])
    refused("Series: is not a table", pd.DataFrame(step_table())["reward"])
    refused("int cannot be read|or a DataFrame", 3)
    duckdb = pytest.importorskip("duckdb")
    twice = duckdb.sql("SELECT 1 AS a, 2 AS a").to_arrow_table()
    if twice.column_names == ["a", "a"]:
        refused("2 columns are named a", read(twice)["a"], lambda c: c[:])
