"""Parquet files and tables of ``datasets``: a row a step, or a row an episode."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from extras import needs
from small_logs import (
    FOLLOWING,
    KEPT,
    assert_counted,
    counted,
    first,
    png,
    refused,
    save,
    save_parquet,
    step_table,
)
from small_logs import UNEQUAL as LENGTHS

from iql_torchrl.data import DatasetWarning, load_dataset

pa, pq = needs("pyarrow"), needs("pyarrow.parquet")

DONES = {"terminated": "dones"}
PICTURES = (np.arange(11 * 4 * 5 * 3) % 251).astype(np.uint8).reshape(11, 4, 5, 3)
STORED = [png(picture) for picture in PICTURES]


def episodes(*, after_the_last=False, **columns):
    """One row an episode, as Decision Transformer's published tables have them."""
    rows = {"observations": [], "actions": [], "rewards": [], "dones": []}
    for number, length in enumerate(LENGTHS):
        observed = 100.0 * number + np.arange(length + after_the_last)
        rows["observations"].append(np.stack([observed, -observed], 1).tolist())
        rows["actions"].append(np.linspace(-1, 1, length)[:, None].tolist())
        rows["rewards"].append(np.arange(float(length)).tolist())
        rows["dones"].append(((np.arange(length) == length - 1) & (number == 1)).tolist())
    rows |= columns
    return {key: values for key, values in rows.items() if values is not None}


def check(dataset, key=("observation",)):
    assert_counted(dataset, LENGTHS, [1], key)


def rows_of(*paths, folder=None):
    from iql_torchrl.data.readers.parquet import parquet_rows

    return parquet_rows("log", paths, folder)


def columns_of(path):
    from iql_torchrl.data.readers.arrow import arrow_columns

    return arrow_columns(rows_of(path), {})


def assert_pictures(rows, key="observation"):
    assert rows[key].dtype == torch.uint8
    assert np.array_equal(rows[key].numpy(), PICTURES[KEPT])
    assert np.array_equal(rows["next"][key].numpy(), PICTURES[FOLLOWING])


def test_rows_of_steps_and_of_episodes(tmp_path):
    dataset = load_dataset(save(tmp_path / "log.parquet", step_table()))
    check(dataset)
    assert first(dataset, "action") == counted(*LENGTHS)["action"][KEPT, 0].tolist()
    path = save(tmp_path / "log.parquet", episodes())
    refused("'dones' may merge termination with truncation", path)
    check(load_dataset(path, columns=DONES))


def test_folders_are_read_in_the_order_of_numbers_and_again_when_a_file_changes(tmp_path):
    for number in range(11):
        part = {key: values[number : number + 1] for key, values in step_table().items()}
        save(tmp_path / "log" / f"part-{number}.parquet", part)
    check(load_dataset(tmp_path / "log"))
    for _ in range(2):
        check(load_dataset(str(tmp_path / "log"), memmap=tmp_path / "table"))
    part = {key: values[:1] for key, values in step_table(reward=[50.0]).items()}
    save(tmp_path / "log" / "part-0.parquet", part)
    dataset = load_dataset(tmp_path / "log", memmap=tmp_path / "table")
    assert first(dataset, ("next", "reward"))[:2] == [50, 1]


@pytest.mark.parametrize("row_group", [1, 3, 11])
@pytest.mark.parametrize("batch_bytes", [1, 2**20])
def test_any_division_into_files_row_groups_and_batches(
    tmp_path, row_group, batch_bytes, monkeypatch
):
    monkeypatch.setattr("iql_torchrl.data.readers.parquet.BATCH_BYTES", batch_bytes)
    monkeypatch.setattr("iql_torchrl.data.build.CHUNK_BYTES", 4 * batch_bytes)
    monkeypatch.setattr("iql_torchrl.data.readers.arrow.PART_BYTES", batch_bytes)
    for number, rows in enumerate((slice(7), slice(7, 8), slice(8, 11))):
        part = {key: values[rows] for key, values in step_table().items()}
        save_parquet(tmp_path / "a" / f"{number}.parquet", part, row_group_size=row_group)
    check(load_dataset(tmp_path / "a"))
    path = save_parquet(tmp_path / "b.parquet", episodes(), row_group_size=row_group)
    check(load_dataset(path, columns=DONES))
    other = step_table(observation=[*STORED[:10], png(PICTURES[0][:2])])
    path = save_parquet(tmp_path / "c.parquet", other, row_group_size=row_group)
    refused("(2, 5, 3)|row 10|(4, 5, 3)", path)


def test_all_columns_share_an_open_file(tmp_path, monkeypatch):
    """Opening a file decodes the metadata of all its columns; batches of one row alternate."""
    monkeypatch.setattr("iql_torchrl.data.readers.parquet.BATCH_BYTES", 1)
    monkeypatch.setattr("iql_torchrl.data.build.CHUNK_BYTES", 1)
    parquet, opened = needs("pyarrow.parquet"), []
    kind = parquet.ParquetFile
    count = lambda path, **options: opened.append(path) or kind(path, **options)  # noqa: E731
    monkeypatch.setattr(parquet, "ParquetFile", count)
    columns = step_table(observation=None, reward=None, episode_index=None)
    names = [f"observation.{number}" for number in range(2)]
    for name, values in zip(names, np.transpose(step_table()["observation"]), strict=True):
        columns[name] = values.tolist()
    columns |= {"reward": step_table()["reward"], "episode": step_table()["episode_index"]}
    files = []
    for number, rows in enumerate((slice(7), slice(7, 11))):
        part = {key: values[rows] for key, values in columns.items()}
        files.append(save_parquet(tmp_path / "a" / f"{number}.parquet", part, row_group_size=3))
    check(load_dataset(tmp_path / "a"))
    assert sorted(opened) == files


def test_single_marks_and_other_columns_of_episodes(tmp_path):
    rows = episodes(
        dones=None, terminated=[False, True, False], episode_id=[7, 8, 9],
        tags=[["a"], ["a", "b"], []],
        ragged=[[[1.0], [1.0, 2.0], [], []], [[], [1.0]], [[1.0]] * 5],
        robot=pa.array(["arm", "arm", "hand"]).dictionary_encode(),
    )  # fmt: skip
    check(load_dataset(save(tmp_path / "log.parquet", rows)))
    # with an observation after the last step
    path = save(tmp_path / "log.parquet", episodes(after_the_last=True))
    dataset, expected = load_dataset(path, columns=DONES), counted(*LENGTHS)
    assert dataset.episode_lengths.tolist() == list(LENGTHS)
    assert first(dataset) == expected["observation"][:, 0].tolist()
    assert first(dataset, ("next", "observation")) == expected["next_observation"][:, 0].tolist()


def test_structs_lists_of_structs_and_names_with_dots_are_groups(tmp_path):
    rows = step_table(reward=None, **{"next.reward": step_table()["reward"]})
    rows["observation"] = [{"state": s, "touch": [s[0] + 0.5]} for s in rows["observation"]]
    path = save(tmp_path / "log.parquet", rows)
    for columns in ({}, {"reward": "next.reward"}):
        dataset = load_dataset(path, columns=columns)
        check(dataset, ("observation", "state"))
        states = first(dataset, ("observation", "state"))
        assert first(dataset, ("observation", "touch")) == [step + 0.5 for step in states]
    check(load_dataset(path, columns={"observation": "observation.state"}))
    rows = episodes()
    rows["observations"] = [[{"state": step} for step in row] for row in rows["observations"]]
    check(load_dataset(save(path, rows), columns=DONES), ("observation", "state"))


@pytest.mark.parametrize("kind", ["png", "struct", "beside the file", "lists"])
def test_pictures_stay_uint8(tmp_path, kind):
    stored = STORED
    if kind == "struct":
        stored = [{"bytes": data, "path": None} for data in STORED]
    elif kind == "beside the file":
        for number, data in enumerate(STORED):
            (tmp_path / f"{number}.png").write_bytes(data)
        stored = [{"bytes": None, "path": f"{number}.png"} for number in range(11)]
    elif kind == "lists":
        stored = pa.array(PICTURES.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    path = save(tmp_path / "log.parquet", step_table(observation=stored))
    assert_pictures(load_dataset(path).transitions)


def short_episode(key):
    rows = episodes()
    rows[key][2] = rows[key][2][:-1]
    return rows


WIDE = [[1.0, 2.0]] * 5 + [[1.0, 2.0, 3.0]] + [[1.0, 2.0]] * 5
NARROW = [[[0.5]] * 4, [[0.5]] * 2, [[0.5]] * 4 + [[0.5, 1.0]]]
BAD = [
    (step_table(reward=None), {}, "no column for reward|episode_index"),
    (step_table(), {"reward": "r"}, "columns maps reward to 'r'"),
    (step_table(observation=WIDE), {}, "lists of 2 and of 3 values|row 5"),
    (step_table(observation=[[1.0]] * 5 + [[1.0, 2.0]] * 6), {}, "observation|of 1 and of 2|row 5"),
    (step_table(reward=[None, *[1] * 10]), {}, "next.reward is NaN|first at row 0 of 11"),
    (step_table(action=[[5]] * 10 + [None]), {}, "action|empty|row 10"),
    (step_table(action=[[5]] * 9 + [[None], [5]]), {}, "action|empty|row 9"),
    (step_table(reward=[None, *[1.0] * 10]), {}, "reward is NaN or infinite|row 0"),
    (step_table(action=[[0.5], None] + [[0.5]] * 9), {}, "action is NaN or infinite|row 1"),
    (step_table(truncated=[None] * 11), {}, "truncated has values of the Arrow type null"),
    (step_table(observation=[*STORED[:10], b"PNG"]), {}, "damaged picture|row 10"),
    (step_table(observation=[{"bytes": None, "path": "no.png"}] * 11), {}, "no.png|row 0"),
    (step_table(observation=[png(np.full((2, 2), 300, np.uint16))] * 11), {}, "uint16|row 0"),
    (short_episode("actions"), DONES, "actions|4 steps|row 2|5"),
    (short_episode("observations"), DONES, "observations|row 2"),
    (episodes(actions=NARROW), DONES, "actions|of 1 and of 2|row 10"),
    ({key: [] for key in step_table()}, {}, "has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "words"), BAD)
def test_bad_tables_are_refused_with_their_place(rows, columns, words, tmp_path):
    path = save(tmp_path / "log.parquet", rows)
    message = refused(f"log.parquet|{words}", path, columns=columns)
    assert message.count(". ") <= 1, message


def test_damaged_and_different_files_are_named(tmp_path):
    path = tmp_path / "log.parquet"
    refused("log.parquet: no such file", path)
    whole = save_parquet(path, step_table(), write_page_checksum=True).read_bytes()
    for content in (b"", whole[:-200], whole[:60] + b"\xff" * 9 + whole[69:]):
        path.write_bytes(content)
        refused("log.parquet: not a complete Parquet file", path)
    (tmp_path / "empty").mkdir()
    refused("a folder of Parquet files, of LeRobot", tmp_path / "empty")
    for name, other, words in (
        ("a", step_table(), ""),
        ("b", step_table(reward=[True] * 11), "b.parquet: |differ| in reward: bool, double before"),
        ("b", step_table(reward=None), "b.parquet: its columns differ| in reward"),
    ):
        save(tmp_path / "two" / f"{name}.parquet", other)
        if words:
            refused(words, tmp_path / "two")


def test_columns_in_names_of_folders_are_read(tmp_path):
    """As Hive, Spark and pandas' ``partition_cols`` write them."""
    data = counted(2, 3, 4)
    number = np.repeat([9, 10, 11], [2, 3, 4])
    del data["truncated"]
    for each in (9, 10, 11):
        part = {key: list(values[number == each]) for key, values in data.items()}
        save_parquet(tmp_path / "log" / f"episode={each}" / "part-0.parquet", part)
    dataset = load_dataset(tmp_path / "log")
    assert dataset.episode_lengths.tolist() == [2, 3, 4]
    assert dataset.transitions["observation"].numpy().tolist() == data["observation"].tolist()
    for name in ("._part-0.parquet", "_temporary/part-1.parquet"):  # which other readers leave out
        hidden = tmp_path / "log" / "episode=9" / name
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"PAR1")
    assert len(load_dataset(tmp_path / "log")) == 9
    late = {key: list(values[number == 11]) for key, values in data.items()} | {"time": [0.0] * 4}
    save_parquet(tmp_path / "log" / "episode=11" / "part-0.parquet", late)
    refused("part-0.parquet: |differ| in time: double, missing before", tmp_path / "log")
    outside = save_parquet(tmp_path / "log" / "late.parquet", late)  # without a folder's value
    rows = rows_of(
        outside, tmp_path / "log" / "episode=11" / "part-0.parquet", folder=tmp_path / "log"
    )
    assert rows.read("episode", 3, 5).to_pylist() == [None, "11"]
    outside.unlink()
    (tmp_path / "log" / "episode=10" / "part-0.parquet").write_bytes(b"PAR1")
    refused("not a complete Parquet file", tmp_path / "log")


@pytest.mark.parametrize("values", ["run a", "007"])
def test_text_in_names_of_folders_is_text(tmp_path, values):
    folder = tmp_path / "log" / f"episode={values.replace(' ', '%20')}"
    save_parquet(folder / "part-0.parquet", {k: list(v) for k, v in counted(2).items()})
    save_parquet(
        tmp_path / "log" / "episode=x" / "a.parquet", {k: list(v) for k, v in counted(3).items()}
    )
    files = sorted((tmp_path / "log").rglob("*.parquet"))
    rows = rows_of(*files, folder=tmp_path / "log")
    assert rows.read("episode", 0, 5).to_pylist() == [values] * 2 + ["x"] * 3
    assert sorted(load_dataset(tmp_path / "log").episode_lengths) == [2, 3]


def test_columns_of_files_come_before_those_of_folders(tmp_path):
    columns = {key: list(values) for key, values in counted(2, 3).items()} | {"part": [7] * 5}
    save_parquet(tmp_path / "log" / "part=1" / "part-0.parquet", columns)
    rows = rows_of(*(tmp_path / "log").rglob("*.parquet"), folder=tmp_path / "log")
    assert rows.read("part", 0, 5).to_pylist() == [7] * 5


@pytest.mark.parametrize("parquet", [False, True])
def test_tensors_of_arrow_keep_their_shape(tmp_path, parquet):
    pictures = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), np.uint8)
    for stored in (pictures, pictures.transpose(0, 2, 1, 3)):  # the second is stored permuted
        table = step_table()
        del table["observation"]
        columns = {key: pa.array(values) for key, values in table.items()}
        columns["observation"] = pa.FixedShapeTensorArray.from_numpy_ndarray(stored)
        source = pa.table(columns)
        if parquet:
            pq.write_table(source, source := tmp_path / "tensors.parquet")
        dataset = load_dataset(source)
        assert dataset.observation_space == gym.spaces.Box(0, 255, stored.shape[1:], np.uint8)
        assert dataset.transitions["observation"].numpy().tolist() == stored[KEPT].tolist()


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-00000-of-00002", "train-00001-of-00002"], None),
        (["train-00000-of-00001", "test-00000-of-00001"], "test, train"),
        (["train", "validation"], "train, validation"),
        (["file-000", "file-001", "episode_000002"], None),
    ],
)
def test_splits_of_one_folder_are_not_joined(tmp_path, names, splits):
    for name in names:
        save(tmp_path / f"{name}.parquet", step_table())
    if splits is None:
        assert len(load_dataset(tmp_path)) == len(KEPT) * len(names)
    else:
        refused(f"holds the splits {splits};", tmp_path)


def test_memory_stays_bounded(tmp_path, monkeypatch):
    """A column of one large row group is never in memory as a whole."""
    numbers = np.random.default_rng(0).normal(size=64 * 60_000)
    column = {"x": pa.FixedSizeListArray.from_arrays(numbers, 64)}
    path = save_parquet(tmp_path / "log.parquet", column, row_group_size=60_000)
    monkeypatch.setattr("iql_torchrl.data.readers.parquet.BATCH_BYTES", 2**20)
    rows = rows_of(path)
    before, most = pa.total_allocated_bytes(), 0
    for start in range(0, 60_000, 1_000):
        assert len(rows.read("x", start, start + 1_000)) == 1_000
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 64 * 60_000 * 8 / 4


def parts(folder, **columns):
    """A folder of two files of ``steps``: of a list, the first value belongs to the first file."""
    for number, rows in enumerate((slice(4), slice(4, 11))):
        part = {key: values[rows] for key, values in step_table().items()}
        for name, kinds in columns.items():
            values = part.get(name, [0] * len(part["reward"]))
            part[name] = pa.array(values).cast(kinds[number]) if kinds[number] else None
        part = {name: values for name, values in part.items() if values is not None}
        save(folder / f"{number}.parquet", part)
    return folder


def test_files_of_other_types_are_one_table_where_nothing_is_lost(tmp_path):
    """Types are cast to the one that has all values; other differences matter if they are used."""
    wide, single = pa.list_(pa.float64()), pa.list_(pa.float32(), 2)
    folder = parts(
        tmp_path / "a",
        reward=(pa.float32(), pa.float64()), episode_index=(pa.int64(), pa.int32()),
        observation=(single, wide), note=(pa.string(), pa.int64()), extra=(pa.int8(), None),
        late=(None, pa.int8()),
    )  # fmt: skip
    dataset = load_dataset(folder)
    check(dataset)
    assert dataset.observation_space.dtype == np.float64
    for name, kinds in (("note", "int64, string before"), ("extra", "missing, int8 before"),
                        ("late", "int8, missing before")):  # fmt: skip
        refused(f"1.parquet: |differ| in {name}: {kinds}", folder, columns={"episode": name})
    check(load_dataset(parts(tmp_path / "b", episode_index=(pa.float64(), pa.int64()))))
    table = pq.read_table(tmp_path / "b" / "1.parquet").drop_columns("reward")
    wide = pa.array([2**53 + 1] * table.num_rows)  # no float64
    pq.write_table(table.append_column("reward", wide), tmp_path / "b" / "1.parquet")
    refused("b: reward: has values that are no double|cast the column", tmp_path / "b")
    units = (pa.timestamp("ms"), pa.timestamp("us"))
    rows = rows_of(*sorted(parts(tmp_path / "d", extra=units).iterdir()))
    assert rows.schema.field("extra").type == pa.timestamp("us")
    assert len(rows.read("extra", 0, 11)) == 11
    folder = parts(tmp_path / "c", reward=(None, pa.float64()))
    refused("1.parquet: |in reward: double, missing before", folder)


def test_times_decimals_text_and_missing_values(tmp_path):
    """Times are seconds, decimals floats; a missing vector is NaN, also where a part has no other."""
    table = {
        "time": pa.array([0, 1_500_000_000], pa.timestamp("ns", "UTC")),
        "day": pa.array([1, None], pa.date32()),
        "reward": pa.array(["0.25", "1"]).cast(pa.decimal128(5, 2)),
        "text": pa.array(["b", "a"]).dictionary_encode(),
        "vector": pa.array([None, [1.0, 2.0]], pa.list_(pa.float32())),
        "picture": pa.array([None, [[1.0], [2.0]]], pa.list_(pa.list_(pa.float32()))),
        "flag": [True, False],
    }
    path = save_parquet(tmp_path / "log.parquet", table)
    columns = columns_of(path)
    assert columns["time"][:].tolist() == [0.0, 1.5]
    assert np.array_equal(columns["day"][:], [86400.0, np.nan], equal_nan=True)
    assert columns["reward"][:].tolist() == [0.25, 1.0]
    assert columns["text"][:].tolist() == ["b", "a"]
    assert columns["flag"][:].dtype == bool
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        vector, picture = columns["vector"][rows], columns["picture"][rows]
        assert np.array_equal(vector, np.array([[np.nan] * 2, [1, 2]])[rows], equal_nan=True)
        assert np.array_equal(picture, np.array([[[np.nan]] * 2, [[1], [2]]])[rows], equal_nan=True)


def test_a_part_without_values_has_the_shape_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("iql_torchrl.data.readers.arrow.PART_BYTES", 1)  # each row is a part
    path = save(tmp_path / "log.parquet", {"a": [None, [1.0, 2.0], None], "b": [1, 2, 3]})
    column = columns_of(path)["a"]
    assert np.array_equal(column[:], [[np.nan] * 2, [1, 2], [np.nan] * 2], equal_nan=True)


def test_ids_of_steps_divide_rows_of_several_episodes(tmp_path):
    """RLlib writes batches: the id of each step, and not the row of the table, is its episode."""
    rows = episodes(eps_id=[[1, 1, 2, 2], [2, 2], [3, 3, 3, 3, 3]])
    columns = columns_of(save(tmp_path / "log.parquet", rows))
    assert "episode" not in columns
    assert columns["eps_id"][:].tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]


def test_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    path = save(tmp_path / "log.parquet", step_table())
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("needs the package datasets |iql_torchrl[readers]", tmp_path / "saved")
    for name in ("arrow", "parquet"):
        monkeypatch.delitem(sys.modules, f"iql_torchrl.data.readers.{name}")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("needs the package pyarrow |iql_torchrl[readers]", path)


# -- tables of ``datasets``


@pytest.fixture
def package():
    return needs("datasets")


def test_datasets_have_the_values_of_the_packages_own_rows(package):
    table = package.Dataset.from_dict(step_table())
    check(load_dataset(table))
    check(load_dataset(package.Dataset.from_dict(episodes()), columns=DONES))
    table = table.select(range(10, -1, -1)).select(range(4))
    dataset = load_dataset(table.with_format("torch"), columns={"terminated": None})
    assert first(dataset) == [row["observation"][0] for row in table][:3]
    assert first(dataset, ("next", "reward")) == [row["reward"] for row in table][:3]


def test_class_labels_have_the_number_of_actions_and_transforms_are_not_applied(package):
    rows = step_table(action=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    table = package.Dataset.from_dict(rows)
    table = table.cast_column("action", package.ClassLabel(names=["a", "b", "c", "d"]))
    assert load_dataset(table).action_space == gym.spaces.Discrete(4)
    transformed = table.with_transform(lambda rows: {k: v * 2 for k, v in rows.items()})
    with pytest.warns(DatasetWarning, match=r"its transform .* is not applied.*source.map"):
        dataset = load_dataset(transformed)
    assert first(dataset) == first(load_dataset(table))


def test_features_of_arrays_and_pictures(package, tmp_path):
    features = package.Features(
        observation={"top": package.Image(), "map": package.Array2D((2, 3), "float32")},
        action=package.Sequence(package.Value("float32"), length=1),
        reward=package.Value("float64"), terminated=package.Value("bool"),
        episode_index=package.Value("int64"),
    )  # fmt: skip
    maps = np.random.default_rng(0).normal(size=(11, 2, 3)).astype(np.float32)
    both = [{"top": top, "map": values} for top, values in zip(STORED, maps, strict=True)]
    table = package.Dataset.from_dict(step_table(observation=both), features=features)
    table.to_parquet(tmp_path / "log.parquet")
    for source in (table, tmp_path / "log.parquet"):
        rows = load_dataset(source).transitions
        assert np.array_equal(rows["observation", "map"].numpy(), maps[KEPT])
        assert_pictures(rows, ("observation", "top"))


def test_saved_folders_splits_and_streams(package, tmp_path):
    table = package.Dataset.from_dict(step_table())
    table.save_to_disk(tmp_path / "alone")
    check(load_dataset(tmp_path / "alone"))
    check(load_dataset(str(tmp_path / "alone"), memmap=tmp_path / "table"))
    (tmp_path / "alone" / "data-00000-of-00001.arrow").write_bytes(b"ARROW")
    refused("alone: cannot be read | copy or save it again", tmp_path / "alone")
    splits = package.DatasetDict(train=table, test=table)
    refused("holds the splits 'train', 'test'|source['train']", splits)
    splits.save_to_disk(tmp_path / "saved")
    refused("holds the splits 'train', 'test'|saved/train", tmp_path / "saved")
    check(load_dataset(tmp_path / "saved" / "train"))
    refused("a stream has no number of rows", table.to_iterable_dataset())
