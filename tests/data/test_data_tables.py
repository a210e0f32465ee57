"""CSV files as spreadsheets, R and pandas write them; JSON, npy and npz files; numbered columns."""

import csv
import json
import sys
import zipfile

import gymnasium as gym
import numpy as np
import pytest
from extras import needs
from small_logs import UNEQUAL as LENGTHS
from small_logs import assert_counted, counted, first, flip, refused, save, step_table

from iql_torchrl.data import load_dataset
from iql_torchrl.data.readers.arrays import UnreadableColumn, group_numbered, open_npz, text_seconds
from iql_torchrl.data.readers.csv_files import open_csv
from iql_torchrl.data.readers.json_files import open_json, open_npy
from iql_torchrl.data.readers.options import ReadOptions


@pytest.fixture(params=["pyarrow", "csv"])
def reader(request, monkeypatch):
    """Both readers of CSV files; they have the same results."""
    if request.param == "pyarrow":
        needs("pyarrow")
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    return request.param


def columns_of(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return open_csv(path).columns


def assert_column(column, expected):
    expected = np.asarray(expected)
    assert column.dtype.kind == expected.dtype.kind
    if expected.dtype.kind == "f":
        assert np.array_equal(column[:], expected, equal_nan=True)
    else:
        assert column[:].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "-2", " 3 "], [1, -2, 3]),
        (["0.5", "1e-3", "Inf"], [0.5, 1e-3, np.inf]),
        (["1", "NA", ""], [1.0, np.nan, np.nan]),
        (["TRUE", "false", "True"], [True, False, True]),
        (["TRUE", "NA", "FALSE"], [1.0, np.nan, 0.0]),
        (["TRUE", "0", "2"], [1, 0, 2]),
        (["NA", "", "null"], [np.nan] * 3),
        ([str(2**63), str(2**64 - 1), "1"], np.array([2**63, 2**64 - 1, 1], np.uint64)),
        ([str(2**63 - 1), str(2**63 - 2), "1"], [2**63 - 1, 2**63 - 2, 1]),
        (["a", "b ", "1_0"], ["a", "b", "1_0"]),
        (["1", "2", "3b"], ["1", "2", "3b"]),
        (["12:30", "1_000", "0x1F"], ["12:30", "1_000", "0x1F"]),
        (["1970-01-02", "1970-01-03", "NA"], [86400.0, 172800.0, np.nan]),
        (
            ["1970-01-01 00:00:01.5", "1970-01-01T01:00:00+01:00", "1970-01-01T00:01Z"],
            [1.5, 0.0, 60.0],
        ),
        (["[0.5, 1]", "[2 3]", ""], [[0.5, 1], [2, 3], [np.nan] * 2]),
    ],
)
def test_kinds_of_csv_cells(tmp_path, reader, cells, expected):
    quoted = "".join(f'{row},"{cell}"\n' for row, cell in enumerate(cells))
    columns = columns_of(tmp_path / "log.csv", f"row,x\n{quoted}")
    assert_column(columns["x"], expected)
    assert columns["row"][:].tolist() == [0, 1, 2]


NAMES = ("observation.0", "observation.1", "action", "reward", "terminated", "episode")


def lines(delimiter=",", number=str, flag=str):
    """A file of ``counted`` as text; the second episode terminates."""
    rows = counted(*LENGTHS, terminated=[1])
    episode = np.repeat(["first", "second", "third"], LENGTHS)
    yield delimiter.join(NAMES)
    for row, name in enumerate(episode):
        values = (*rows["observation"][row], rows["action"][row, 0], rows["reward"][row])
        cells = [number(float(value)) for value in values]
        yield delimiter.join([*cells, flag(bool(rows["terminated"][row])), str(name)])


def assert_lines(path):
    columns = open_csv(path).columns
    expected = counted(*LENGTHS, terminated=[1])
    grouped = group_numbered(columns, "log.csv")
    assert np.array_equal(grouped["observation"][:], expected["observation"])
    assert np.allclose(columns["action"][:], expected["action"][:, 0], atol=1e-7)
    assert columns["terminated"].dtype == bool
    assert columns["terminated"][:].tolist() == expected["terminated"].tolist()
    assert (
        columns["episode"][:].tolist() == np.repeat(["first", "second", "third"], LENGTHS).tolist()
    )


def test_csv_files_of_spreadsheets(tmp_path, reader):
    """Semicolons with decimal commas, tabs, the byte order mark, and the line ``sep=``."""
    path = tmp_path / "log.csv"
    german = "\r\n".join(lines(";", lambda x: str(x).replace(".", ","), lambda x: str(x).upper()))
    for text in (german, "\ufeff" + german, "sep=;\r\n" + german, german.replace(";", "; ")):
        path.write_bytes(text.encode())
        assert_lines(path)
        assert open_csv(path).notes == (
            "commas in numbers were read as decimal commas: 0,5 is 0.5.",
        )
    for delimiter in (";", "\t", "|"):
        path.write_text("\n".join(lines(delimiter)))
        assert_lines(path)
        assert open_csv(path).notes == ()
    # where commas are decimal, a dot groups thousands; elsewhere a comma does
    columns = columns_of(path, "a;b;c\n0,5;1.234;1.234,5\n2;5.678;2\n")
    assert_column(columns["a"], [0.5, 2.0])
    assert_column(columns["b"], ["1.234", "5.678"])
    assert_column(columns["c"], ["1.234,5", "2"])
    assert_column(columns_of(path, "a\tb\n1,234\t0.5\n")["a"], ["1,234"])
    assert_column(columns_of(path, "a\tb\n1,234\t1,5.5\n")["a"], ["1,234"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
def test_spreadsheets_saved_as_text_with_tabs(tmp_path, reader, encoding):
    """Tabs with decimal commas, also in UTF-16, as spreadsheets save "Unicode text"."""
    path = tmp_path / "log.csv"
    text = "\n".join(lines("\t", lambda x: str(x).replace(".", ",")))
    path.write_bytes(b"\xfe\xff" * (encoding == "utf-16-be") + text.encode(encoding))
    assert_lines(path)
    assert open_csv(path).notes == ("commas in numbers were read as decimal commas: 0,5 is 0.5.",)


def test_csv_files_of_r(tmp_path, reader):
    """Names of rows, quoted names, TRUE and FALSE, NA where it is not used."""
    path = tmp_path / "log.csv"
    head, *rows = lines(flag=lambda flag: str(flag).upper())
    names = ",".join(f'"{name}"' for name in ["", *head.split(","), "note"])
    rows = [f'"{number}",{row},NA' for number, row in enumerate(rows, 1)]
    path.write_text("\n".join([names, *rows]))
    assert_lines(path)
    assert set(open_csv(path).columns) == {*NAMES, "note"}


def test_csv_files_that_are_refused(tmp_path, reader):
    path = tmp_path / "log.csv"
    for text, words in (
        ("", "log.csv: is empty; expected a first line of names"),
        ("\n\n", "log.csv: is empty"),
        ("a,b\n", "log.csv: has names and no rows; expected one row per step"),
        (
            "0.5,1,True\n0.25,2,False\n",
            "its first line is 0.5, 1, True; expected names|observation.0",
        ),
        ("0,5;1;2\n0,25;2;2\n", "its first line is 0,5, 1, 2; expected names"),
        ("a,b\n1,2\n3\n", "row 1 has 1 cells; expected 2"),
        ("a;b\n1;2;3\n", "row 0 has 3 cells; expected 2|';' is the delimiter"),
        ('"a","b"\n"1",2,3\n"2",4,5\n', "row 0 has 3 cells|name the first column too|col.names=NA"),
        ("a,b,a\n1,2,3\n", "the column 'a' occurs twice"),
    ):
        path.write_text(text)
        refused(words, path)
    # the numbers that pandas gives to columns without names
    assert list(columns_of(path, "0,1,2\n5,6,7\n")) == ["0", "1", "2"]


def test_empty_cells_and_other_lists_matter_where_they_are_used(tmp_path, reader):
    text = 'a,b,c\nx,"[1, 2]",[1 ... 2]\nNA,[1],[1 ... 2]\n'
    columns = columns_of(tmp_path / "log.csv", text)
    for name, words in (
        ("a", "log.csv, column 'a', row 1: 'NA' is a missing value"),
        ("b", "log.csv, column 'b' has lists such as '[1, 2]' of different lengths"),
        ("c", "log.csv, column 'c' has lists such as '[1 ... 2]'"),
    ):
        refused(words, columns[name], lambda column: column[:])


def test_csv_text_of_any_length_and_encoding(tmp_path, reader):
    text = 'a,b\n1,"one, two\nthree"\n2, "four"\n'
    assert_column(columns_of(tmp_path / "log.csv", text)["b"], ["one, two\nthree", "four"])
    columns = columns_of(tmp_path / "log.csv", "a,b\n1,caf\xe9\n", "latin-1")
    assert_column(columns["b"], ["caf\ufffd"])
    columns = columns_of(tmp_path / "log.csv", f"a,b\n1,{'x' * 1000}\n2,y\n")
    assert columns["b"].dtype == object  # not 1000 characters a row
    if reader == "csv":
        limit = csv.field_size_limit()
        text = f"a,b\n1,{'x' * (limit + 1)}\n"
        (tmp_path / "log.csv").write_text(text)
        refused("log.csv: is not a table of numbers|field larger than", tmp_path / "log.csv")


def test_text_that_is_a_time():
    for text in ("2026-13-01", "2026-01-01-05", "20260101", "a", "12:30", "2026-01-01T1030"):
        assert text_seconds([text]) is None
    assert text_seconds([]) is None
    assert text_seconds(["1970-01-01T00:00:00.123456789Z"]).tolist() == [0.123456]
    assert text_seconds(["1970-01-01 01:00-0130"]).tolist() == [3600.0 + 5400.0]


# -- numbered columns


def test_numbered_columns_are_grouped_where_they_can_be():
    number, flags = np.arange(3), np.array([True, False, True])
    columns = {
        "a.1": number, "b": number, "a.0": number / 2, "c.0": number, "c.2": number, "d": number,
        "d.0": number, "e.0": number, "e.00": number, "f.x.0": flags, "next.reward": number,
        "g.0": np.ones((3, 2)), "h.0": number, "h.1": np.array(["a", "b", "c"]),
        "i.0": UnreadableColumn("i.0 differs"), "j.0": number[:, None],
    }  # fmt: skip
    grouped = group_numbered(columns, "log")
    assert grouped["a"][:].tolist() == [[0.0, 0], [0.5, 1], [1.0, 2]]
    assert grouped["a"][1:2].tolist() == [[0.5, 1.0]]
    assert grouped["f/x"].dtype == bool
    assert grouped["f/x"].shape == (3, 1)
    assert grouped["next/reward"] is number
    assert grouped["g/0"].shape == (3, 2)
    assert grouped["h"][:].tolist() == [["0", "a"], ["1", "b"], ["2", "c"]]
    assert grouped["j"][:].tolist() == [[0], [1], [2]]
    for name, words in (
        (
            "c",
            "log: the columns of 'c' are c.0, c.2; expected c, or c.0, c.1 and so on without a gap",
        ),
        ("d", "log: the columns of 'd' are d, d.0"),
        ("e", "log: the columns of 'e' are e.0, e.00"),
        ("i", "i.0 differs"),
    ):
        refused(words, grouped[name], lambda column: column[:])
    assert grouped["c.2"] is number  # may be named in a list


# -- JSON, npy and npz files


def objects():
    rows = step_table(note=["a"] * sum(LENGTHS))
    return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def test_json_of_one_object_a_step(tmp_path):
    needs("pyarrow")
    rows = objects()
    text = "\n".join(map(json.dumps, rows))
    frame = {name: {str(n): row[name] for n, row in enumerate(rows)} for name in ("reward", "note")}
    for name, content in (
        ("log.jsonl", text), ("log.ndjson", text.replace("\n", "\r\n\n")), ("log.json", text),
        ("log.json", json.dumps(rows, indent=1)),
        # pyarrow refuses a column of numbers and text, which nothing uses
        ("log.jsonl", text.replace('"note": "a"', '"note": 1', 1)),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_text(content)
        assert_counted(load_dataset(path), LENGTHS, [1])
    path.write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))
    assert_counted(load_dataset(path.rename(tmp_path / "log.json")), LENGTHS, [1])
    (tmp_path / "log.json").write_text(json.dumps(frame))
    columns = open_json(tmp_path / "log.json", ReadOptions()).columns
    assert_column(columns["reward"], [row["reward"] for row in rows])
    assert_column(columns["note"], ["a"] * len(rows))


def test_json_times_and_missing_values(tmp_path):
    """The same from a list of objects as from lines."""
    needs("pyarrow")
    rows = [
        {"time": "1970-01-01T00:00:01", "x": 1, "y": float("nan")},
        {"time": "1970-01-02T00:00:00"},
    ]
    for name, text in (
        ("log.jsonl", "\n".join(map(json.dumps, rows))), ("log.json", json.dumps(rows)),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        columns = open_json(tmp_path / name, ReadOptions()).columns
        assert_column(columns["time"], [1.0, 86400.0])
        assert_column(columns["y"], [np.nan, np.nan])
        refused("x has 1 empty values, first at row 1", columns["x"], lambda column: column[:])


def test_rllibs_sample_batches(tmp_path):
    """One object a batch; ``eps_id`` divides the steps, also where an episode goes on in the next."""
    needs("pyarrow")
    rows = counted(*LENGTHS, terminated=[1])
    ids = np.repeat([70, 80, 90], LENGTHS)
    batches = [
        {
            "type": "SampleBatch", "obs": rows["observation"][part].tolist(),
            "new_obs": rows["next_observation"][part].tolist(),
            "actions": rows["action"][part].tolist(), "rewards": rows["reward"][part].tolist(),
            "terminateds": rows["terminated"][part].tolist(),
            "truncateds": rows["truncated"][part].tolist(), "eps_id": ids[part].tolist(),
            "infos": [{}] * len(ids[part]), "unroll_id": [0] * len(ids[part]),
        }
        for part in (slice(0, 5), slice(5, 8), slice(8, 11))
    ]  # fmt: skip
    path = tmp_path / "output.json"
    path.write_text("\n".join(map(json.dumps, batches)))
    names = {"next_observation": "new_obs", "episode": "eps_id"}
    dataset = load_dataset(path, columns=names)
    assert dataset.episode_lengths.tolist() == list(LENGTHS)
    assert first(dataset) == rows["observation"][:, 0].tolist()
    assert first(dataset, ("next", "observation")) == rows["next_observation"][:, 0].tolist()
    path.write_text(json.dumps(batches[0] | {"obs": "BCJNGGhA"}) + "\n{}\n")
    refused("output.json: RLlib compressed the observations|output_compress_columns=[]", path)
    path.write_text(json.dumps({"type": "MultiAgentBatch", "policy_batches": {}}) + "\n{}\n")
    refused("output.json: has batches of several agents", path)


def test_json_files_that_are_refused(tmp_path):
    needs("pyarrow")
    for name, text, words in (
        ("log.json", "", "log.json: not complete JSON"),
        ("log.jsonl", "", "log.jsonl: has no rows"),
        ("log.jsonl", '{"a": 1}\n\n{"a": 2\n', "log.jsonl: not complete JSON in line 3"),
        ("log.jsonl", '{"a": 1}\n3\n', "log.jsonl: has other values than objects; expected a list"),
        ("log.json", "[1, 2]", "log.json: has other values than objects"),
        ("log.json", "3", "log.json: has other values than objects"),
    ):
        (tmp_path / name).write_text(text)
        refused(words, tmp_path / name)


def test_structured_arrays_in_npy_files(tmp_path):
    rows, path = counted(*LENGTHS, terminated=[1]), tmp_path / "log.npy"
    kinds = [
        ("observation", np.float32, (2,)), ("action", np.float32, (1,)), ("reward", np.float64),
        ("terminated", np.bool_), ("episode", np.int64), ("info", [("x", np.int8)]),
    ]  # fmt: skip
    values = np.zeros(sum(LENGTHS), kinds)
    for key in ("observation", "action", "reward", "terminated"):
        values[key] = rows[key]
    values["episode"] = np.repeat([7, 8, 9], LENGTHS)
    np.save(path, values)
    assert_counted(load_dataset(path), LENGTHS, [1])
    assert "info/x" in open_npy(path)
    for array, words in (
        (np.ones((4, 3)), "log.npy: has an array of shape (4, 3) and dtype float64 without names"),
        (
            np.array({"reward": rows["reward"]}),
            "log.npy: has Python objects, which are not unpickled",
        ),
    ):
        np.save(path, array, allow_pickle=True)
        refused(words, path)
    np.save(path, values)
    for content in (path.read_bytes()[:-9], path.read_bytes()[:40], b""):
        path.write_bytes(content)
        refused("log.npy: not a complete npy file", path)


def test_npz_arrays_are_read_by_rows(tmp_path):
    """Only of an archive that is not compressed; every order of memory, and damaged values."""
    numbers = np.arange(24.0).reshape(6, 2, 2)
    data = {
        "a": numbers, "b": np.asfortranarray(numbers), "c": np.arange(6)[::2], "one": np.float64(3),
        "text": np.array(["a", "bc"]), "f": np.asfortranarray(numbers[:, :1, 0]),
    }  # fmt: skip
    path = save(tmp_path / "log.npz", data)
    columns = open_npz(path)
    assert "one" not in columns
    for name, column in columns.items():
        assert column.dtype == data[name].dtype
        for rows in (slice(None), slice(1, 3), slice(5, 99), slice(3, 3)):
            assert np.array_equal(column[rows], data[name][rows]), name
    assert not isinstance(columns["a"], np.ndarray)
    np.savez_compressed(path, **data)
    assert isinstance(open_npz(path)["a"], np.ndarray)
    noise = np.random.default_rng(0).normal(size=1000)
    save(path, {"a": noise, "b": np.ones(2)})
    flip(path)
    columns = open_npz(path)
    refused("log.npz: not a complete npz archive|CRC", columns["a"], lambda column: column[:2])
    assert columns["b"][:].tolist() == [1, 1]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"no array")
    refused("log.npz: not a complete npz archive", path)


def test_actions_of_json_and_csv_are_integers(tmp_path):
    """Integers are floats where the space has floats: neither kind of file tells them apart."""
    needs("pyarrow")
    rows = [row | {"reward": n, "observation": [n, -n]} for n, row in enumerate(objects())]
    path = tmp_path / "log.jsonl"
    path.write_text(
        "\n".join(json.dumps({**row, "action": row["episode_index"] % 2}) for row in rows)
    )
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    dataset = load_dataset(path, observation_space=space)
    assert dataset.action_space == gym.spaces.Discrete(2)
    assert first(dataset, ("next", "reward"))[:3] == [0.0, 1.0, 2.0]
