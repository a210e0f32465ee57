"""Parquet files and tables of ``datasets``: a row a step, or a row an episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arrow_tables as tables
import numpy as np
import pytest
import torch
from arrow_tables import LENGTHS, episodes, png, steps, write

from iql_torchrl.data import DatasetError, DatasetWarning, OfflineDataset, load_dataset

pa = pytest.importorskip("pyarrow")

#: Truncated episodes lose their last row, which has no successor; the terminated one keeps it.
OBSERVED = [0, 1, 2, 100, 101, 200, 201, 202, 203]
FOLLOWING = [1, 2, 3, 101, 101, 201, 202, 203, 204]


def first(dataset: OfflineDataset, key: Any = "observation") -> list[float]:
    values = dataset.transitions[key]
    return values.reshape(len(dataset), -1)[:, 0].tolist()


def check(dataset: OfflineDataset) -> None:
    assert dataset.episode_lengths.tolist() == [3, 2, 4]
    assert first(dataset) == OBSERVED
    assert first(dataset, ("next", "observation")) == FOLLOWING
    assert first(dataset, ("next", "reward")) == [step % 100 for step in OBSERVED]
    assert first(dataset, ("next", "terminated")) == [step == 101 for step in OBSERVED]
    assert first(dataset, ("next", "truncated")) == [step in (2, 203) for step in OBSERVED]


def test_parquet_of_steps(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path / "log.parquet", steps()))
    check(dataset)
    actions = np.linspace(-1, 1, 11, dtype=np.float32)[[0, 1, 2, 4, 5, 6, 7, 8, 9]]
    assert np.array_equal(dataset.transitions["action"][:, 0].numpy(), actions)


def test_parquet_of_episodes(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", episodes())
    with pytest.raises(DatasetError, match=r"'dones' may merge termination with truncation"):
        load_dataset(path)
    check(load_dataset(path, columns={"terminated": "dones"}))


def test_folders_are_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    for number in range(11):
        part = {key: values[number : number + 1] for key, values in steps().items()}
        write(tmp_path / "log" / f"part-{number}.parquet", part)
    check(load_dataset(tmp_path / "log"))
    check(load_dataset(str(tmp_path / "log")))


@pytest.mark.parametrize("row_group", [1, 3, 11])
@pytest.mark.parametrize("batch_bytes", [1, 2**20])
def test_any_division_into_row_groups_and_batches(
    tmp_path: Path, row_group: int, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iql_torchrl.data.readers.arrow.BATCH_BYTES", batch_bytes)
    monkeypatch.setattr("iql_torchrl.data.readers.episodes.CHUNK_BYTES", 4 * batch_bytes)
    monkeypatch.setattr("iql_torchrl.data.readers.arrow.PART_BYTES", batch_bytes)
    check(load_dataset(write(tmp_path / "a.parquet", steps(), row_group_size=row_group)))
    path = write(tmp_path / "b.parquet", episodes(), row_group_size=row_group)
    check(load_dataset(path, columns={"terminated": "dones"}))


def test_random_access_equals_pyarrows_own_reading(tmp_path: Path) -> None:
    from iql_torchrl.data.readers.arrow import ParquetRows, arrow_columns

    values = np.random.default_rng(0).normal(size=(500, 3))
    files = [
        write(
            tmp_path / f"{n}.parquet",
            {"x": values[n * 100 : n * 100 + 100].tolist()},
            row_group_size=7,
        )
        for n in range(5)
    ]
    column = arrow_columns(ParquetRows("log", files), {})["x"]
    assert (column.shape, column.dtype) == ((500, 3), np.float64)
    for start, stop in ((0, 500), (90, 110), (3, 4), (499, 500), (0, 0), (250, 480), (105, 250)):
        assert np.array_equal(column[start:stop], values[start:stop]), (start, stop)


def test_an_observation_after_the_last_step(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", episodes(after_the_last=True))
    dataset = load_dataset(path, columns={"terminated": "dones"})
    assert dataset.episode_lengths.tolist() == list(LENGTHS)
    assert first(dataset) == tables.STEPS.tolist()
    assert first(dataset, ("next", "observation")) == (tables.STEPS + 1).tolist()


def test_single_marks_and_other_columns_of_episodes(tmp_path: Path) -> None:
    rows = episodes()
    del rows["dones"]
    rows["terminated"], rows["episode_id"] = [False, True, False], [7, 8, 9]
    rows["tags"] = [["a"], ["a", "b"], []]
    rows["ragged"] = [[[1.0], [1.0, 2.0], [], []], [[], [1.0]], [[1.0]] * 5]
    rows["robot"] = pa.array(["arm", "arm", "hand"]).dictionary_encode()
    check(load_dataset(write(tmp_path / "log.parquet", rows)))


def test_structs_lists_of_structs_and_names_with_dots_are_groups(tmp_path: Path) -> None:
    rows = steps()
    rows["observation"] = [{"state": s, "touch": [s[0] + 0.5]} for s in rows["observation"]]
    rows["next.reward"] = rows.pop("reward")
    path = write(tmp_path / "log.parquet", rows)
    for columns in ({}, {"reward": "next.reward"}):
        dataset = load_dataset(path, columns=columns)
        assert first(dataset, ("observation", "state")) == OBSERVED
        assert first(dataset, ("observation", "touch")) == [step + 0.5 for step in OBSERVED]
    assert first(load_dataset(path, columns={"observation": "observation.state"})) == OBSERVED
    rows = episodes()
    rows["observations"] = [[{"state": step} for step in row] for row in rows["observations"]]
    dataset = load_dataset(write(path, rows), columns={"terminated": "dones"})
    assert first(dataset, ("observation", "state")) == OBSERVED


def pictures() -> np.ndarray:
    return (np.arange(11 * 4 * 5 * 3) % 251).astype(np.uint8).reshape(11, 4, 5, 3)


@pytest.mark.parametrize("kind", ["png", "struct", "beside the file", "lists"])
def test_pictures_stay_uint8(tmp_path: Path, kind: str) -> None:
    stored: Any = [png(picture) for picture in pictures()]
    if kind == "struct":
        stored = [{"bytes": data, "path": None} for data in stored]
    elif kind == "beside the file":
        for number, data in enumerate(stored):
            (tmp_path / f"{number}.png").write_bytes(data)
        stored = [{"bytes": None, "path": f"{number}.png"} for number in range(11)]
    elif kind == "lists":
        stored = pa.array(pictures().tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    rows = load_dataset(
        write(tmp_path / "log.parquet", {**steps(), "observation": stored})
    ).transitions
    assert rows["observation"].dtype == torch.uint8
    assert np.array_equal(rows["observation"].numpy(), pictures()[[0, 1, 2, 4, 5, 6, 7, 8, 9]])
    following = rows["next", "observation"].numpy()
    assert np.array_equal(following, pictures()[[1, 2, 3, 5, 5, 7, 8, 9, 10]])


def test_a_memory_mapped_table_is_reused_until_a_file_changes(tmp_path: Path) -> None:
    rows = steps()
    for reward in (0.0, 0.0, 50.0):
        rows["reward"][0] = reward
        if reward or not (tmp_path / "log").exists():
            write(tmp_path / "log" / "a.parquet", rows)
        dataset = load_dataset(tmp_path / "log", memmap=tmp_path / "table")
        assert first(dataset) == OBSERVED
        assert first(dataset, ("next", "reward"))[0] == reward


def spoiled(**columns: Any) -> dict[str, Any]:
    return {key: v for key, v in {**steps(), **columns}.items() if v is not None}


def short_episode(key: str) -> dict[str, Any]:
    rows = episodes()
    rows[key][2] = rows[key][2][:-1]
    return rows


WIDE = [[1.0, 2.0]] * 5 + [[1.0, 2.0, 3.0]] + [[1.0, 2.0]] * 5
BAD: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "no reward": (spoiled(reward=None), {}, ["no column for reward", "episode_index"]),
    "no such column": (steps(), {"reward": "r"}, ["columns maps reward to 'r'"]),
    "ragged steps": (spoiled(observation=WIDE), {}, ["lists of 2 and of 3 values", "row 5"]),
    "ragged from a chunk on": (
        spoiled(observation=[[1.0]] * 5 + [[1.0, 2.0]] * 6), {},
        ["observation", "of 1 and of 2", "row 5"],
    ),
    "empty values": (spoiled(reward=[None, *[1.0] * 10]), {}, ["reward", "1 empty values", "row 0"]),
    "empty lists": (spoiled(action=[[0.5]] * 10 + [None]), {}, ["action", "empty", "row 10"]),
    "empty numbers in lists": (
        spoiled(action=[[0.5]] * 9 + [[None], [0.5]]), {}, ["action", "empty", "row 9"],
    ),
    "text": (spoiled(observation=["a"] * 11), {}, ["observation", "<U", "real numbers"]),
    "whole numbers as observations": (
        spoiled(observation=[[[1, 2]]] * 11), {}, ["observation", "int64", "(1, 2)"],
    ),
    "damaged pictures": (
        spoiled(observation=[png(p) for p in pictures()[:10]] + [b"PNG"]), {},
        ["damaged picture", "row 10"],
    ),
    "pictures of other sizes": (
        spoiled(observation=[png(p) for p in pictures()[:10]] + [png(pictures()[0][:2])]), {},
        ["(2, 5, 3)", "row 10", "(4, 5, 3)"],
    ),
    "absent pictures": (
        spoiled(observation=[{"bytes": None, "path": "no.png"}] * 11), {}, ["no.png", "row 0"],
    ),
    "pictures of 16 bits": (
        spoiled(observation=[png(np.full((2, 2), 300, np.uint16))] * 11), {}, ["uint16", "row 0"],
    ),
    "a short sequence": (
        short_episode("actions"), {"terminated": "dones"}, ["actions", "4 steps", "row 2", "5"],
    ),
    "one longer observation": (
        short_episode("observations"), {"terminated": "dones"}, ["observations", "row 2"],
    ),
    "ragged sequences": (
        {**episodes(), "actions": [[[0.5]] * 4, [[0.5]] * 2, [[0.5]] * 4 + [[0.5, 1.0]]]},
        {"terminated": "dones"}, ["actions", "of 1 and of 2", "row 10"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_with_their_place(case: str, tmp_path: Path) -> None:
    rows, columns, words = BAD[case]
    path = write(tmp_path / "log.parquet", rows)
    with pytest.raises(DatasetError) as caught:
        load_dataset(path, columns=columns)
    message = str(caught.value)
    assert all(word in message for word in ["log.parquet", *words]), message
    assert message.count(". ") <= 1, message


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    with pytest.raises(DatasetError, match=r"log\.parquet: no such file"):
        load_dataset(path)
    whole = write(tmp_path / "whole.parquet", steps(), write_page_checksum=True).read_bytes()
    for content in (b"", whole[:-200], whole[:60] + b"\xff" * 9 + whole[69:]):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"log\.parquet: not a complete Parquet file"):
            load_dataset(path)


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", steps())
    write(tmp_path / "b.parquet", {**steps(), "reward": [1] * 11})
    with pytest.raises(
        DatasetError, match=r"b\.parquet: .* differ .* reward: double, reward: int64"
    ):
        load_dataset(tmp_path)
    write(tmp_path / "b.parquet", spoiled(reward=None))
    with pytest.raises(DatasetError, match=r"b\.parquet: its columns differ .* in reward"):
        load_dataset(tmp_path)


def test_an_empty_table_and_an_empty_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {key: [] for key in steps()})
    with pytest.raises(DatasetError, match="has no rows"):
        load_dataset(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="a folder of Parquet files, of LeRobot"):
        load_dataset(tmp_path / "empty")


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of one large row group is never in memory as a whole."""
    from iql_torchrl.data.readers.arrow import ParquetRows

    values = pa.FixedSizeListArray.from_arrays(
        np.random.default_rng(0).normal(size=64 * 60_000), 64
    )
    path = write(tmp_path / "log.parquet", {"x": values}, row_group_size=60_000)
    monkeypatch.setattr("iql_torchrl.data.readers.arrow.BATCH_BYTES", 2**20)
    rows = ParquetRows("log", [path])
    before, most = pa.total_allocated_bytes(), 0
    for start in range(0, 60_000, 1_000):
        assert len(rows.read("x", start, start + 1_000)) == 1_000
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 64 * 60_000 * 8 / 4


class TestDatasets:
    @pytest.fixture
    def package(self) -> Any:
        return pytest.importorskip("datasets")

    def test_steps_and_episodes(self, package: Any) -> None:
        check(load_dataset(package.Dataset.from_dict(steps())))
        table = package.Dataset.from_dict(episodes())
        check(load_dataset(table, columns={"terminated": "dones"}))

    def test_values_equal_the_packages_own_rows(self, package: Any) -> None:
        table = package.Dataset.from_dict(steps()).select(range(10, -1, -1)).select(range(4))
        dataset = load_dataset(table.with_format("torch"), columns={"terminated": None})
        assert first(dataset) == [row["observation"][0] for row in table][:3]
        assert first(dataset, ("next", "reward")) == [row["reward"] for row in table][:3]

    def test_saved_folders(self, package: Any, tmp_path: Path) -> None:
        package.Dataset.from_dict(steps()).save_to_disk(tmp_path / "saved")
        check(load_dataset(tmp_path / "saved"))
        check(load_dataset(str(tmp_path / "saved"), memmap=tmp_path / "table"))
        (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"ARROW")
        with pytest.raises(DatasetError, match=r"saved: cannot be read .* copy or save it again"):
            load_dataset(tmp_path / "saved")

    def test_features_of_arrays_and_pictures(self, package: Any, tmp_path: Path) -> None:
        features = package.Features(
            observation={"top": package.Image(), "map": package.Array2D((2, 3), "float32")},
            action=package.Sequence(package.Value("float32"), length=1),
            reward=package.Value("float64"), terminated=package.Value("bool"),
            episode_index=package.Value("int64"),
        )  # fmt: skip
        maps = np.random.default_rng(0).normal(size=(11, 2, 3)).astype(np.float32)
        rows = steps()
        rows["observation"] = [
            {"top": picture, "map": values}
            for picture, values in zip(pictures(), maps, strict=True)
        ]
        table = package.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "log.parquet")
        kept = [0, 1, 2, 4, 5, 6, 7, 8, 9]
        for source in (table, tmp_path / "log.parquet"):
            observed = load_dataset(source).transitions["observation"]
            assert np.array_equal(observed["map"].numpy(), maps[kept])
            assert np.array_equal(observed["top"].numpy(), pictures()[kept])

    def test_splits_and_streams_are_refused(self, package: Any, tmp_path: Path) -> None:
        table = package.Dataset.from_dict(steps())
        splits = package.DatasetDict(train=table, test=table)
        with pytest.raises(
            DatasetError, match=r"holds the splits 'train', 'test'.*source\['train'\]"
        ):
            load_dataset(splits)
        splits.save_to_disk(tmp_path / "saved")
        with pytest.raises(DatasetError, match=r"holds the splits 'train', 'test'.*saved/train"):
            load_dataset(tmp_path / "saved")
        check(load_dataset(tmp_path / "saved" / "train"))
        with pytest.raises(DatasetError, match="a stream has no number of rows"):
            load_dataset(table.to_iterable_dataset())


def test_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    path = write(tmp_path / "log.parquet", steps())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"needs the package datasets .*iql_torchrl\[readers\]"):
        load_dataset(tmp_path / "saved")
    monkeypatch.delitem(__import__("sys").modules, "iql_torchrl.data.readers.arrow")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DatasetError, match=r"needs the package pyarrow .*iql_torchrl\[readers\]"):
        load_dataset(path)


def test_fixed_lengths_of_terminations_are_still_named(tmp_path: Path) -> None:
    rows = {
        "observations": [[[float(n), 1.0 * t] for n in range(6)] for t in range(4)],
        "actions": [[[0.1 * n] for n in range(6)] for _ in range(4)],
        "rewards": [[1.0] * 6] * 4,
        "dones": [[False] * 5 + [True]] * 4,
    }
    path = write(tmp_path / "log.parquet", rows)
    with pytest.warns(DatasetWarning, match=r"all 4 terminations \('dones'\) come at step 6"):
        load_dataset(path, columns={"terminated": "dones"})
