"""Files that name other places, pickles in tables, splits of Parquet files."""

from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import TensorDict

from iql_torchrl.data.built_folder import load_rows
from iql_torchrl.data.readers.parquet import parquet_files
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.data.shards.files import ShardFiles


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:\\x", "a\\b", ""])
def test_names_lead_below_the_folder(tmp_path, name):
    files = ShardFiles(str(tmp_path))
    with pytest.raises(DatasetError, match="expected a path below its own folder"):
        files.read(name)
    with (
        pytest.raises(DatasetError, match="expected a path below its own folder"),
        files.folder(name, list, "abc", lambda folder: None),
    ):
        pass


def test_files_of_a_remote_record_stay_below_the_copy(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/log/a/outside", b"x")
    files = ShardFiles("memory://log", tmp_path / "cache")
    with (
        pytest.raises(DatasetError, match=r"'\.\./\.\./outside'"),
        files.folder("a", lambda: ["../../outside"], "abc", lambda folder: None),
    ):
        pass
    assert not (tmp_path / "outside").exists()
    with (
        pytest.raises(DatasetError, match=r"has the digest '\.\./x'"),
        files.folder("a", list, "../x", lambda folder: None),
    ):
        pass


def test_a_pickle_in_a_table_is_not_loaded(tmp_path):
    table = tmp_path / "table"
    TensorDict({"a": torch.arange(3)}, [3]).memmap_(table)
    assert load_rows(table)["a"].tolist() == [0, 1, 2]
    (table / "other.pickle").write_bytes(pickle.dumps({"b": 1}))
    with pytest.raises(DatasetError, match=r"other\.pickle.*would run code"):
        load_rows(table)


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
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    if splits is None:
        assert len(parquet_files(tmp_path)) == len(names)
    else:
        with pytest.raises(DatasetError, match=f"holds the splits {splits};"):
            parquet_files(tmp_path)
