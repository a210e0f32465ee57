"""Files that name other places, pickles in tables, splits of Parquet files."""

from __future__ import annotations

import pickle

import gymnasium as gym
import pytest
import torch
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from tensordict import TensorDict

from iql_torchrl.data.built_folder import load_rows
from iql_torchrl.data.readers.arrow import parquet_files
from iql_torchrl.data.readers.environments import recorded_env_maker
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


def test_a_table_reads_no_file_outside_of_its_folder(tmp_path):
    table = tmp_path / "table"
    TensorDict({"a": torch.arange(3)}, [3]).memmap_(table)
    (table / "a.memmap").rename(tmp_path / "a.memmap")
    description = table / "meta.json"
    description.write_text(description.read_text().replace('"a"', '"../a"'))
    with pytest.raises(DatasetError, match=r"meta\.json: names a file outside of its folder"):
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


class Danger(gym.Env):
    """An environment that a table must not be able to make."""

    def __init__(self):
        raise AssertionError("code that a file names was run")


def spec(id="Pendulum-v1", entry_point=f"{__name__}:Danger", **options):
    return EnvSpec(id, entry_point=entry_point, **options)


def test_an_entry_point_in_a_table_is_not_called():
    made = recorded_env_maker(spec(kwargs={"g": 5.0}, max_episode_steps=7))()
    assert type(made.unwrapped).__name__ == "PendulumEnv"
    assert made.unwrapped.g == 5.0
    assert made.spec.max_episode_steps == 7


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (spec("os:Pendulum-v1"), r"'os:Pendulum-v1'.*begins with a module to import.*pass env="),
        (spec("Danger-v0"), r"'Danger-v0', as the data name it, is not registered.*pass env="),
        (
            spec(additional_wrappers=(WrapperSpec("Danger", f"{__name__}:Danger", {}),)),
            r"has the wrapper '.*:Danger'; only Gymnasium's wrappers",
        ),
        (
            spec(additional_wrappers=(WrapperSpec("x", "gymnasium.wrappers.rendering:os", {}),)),
            r"has the wrapper 'gymnasium\.wrappers\.rendering:os'",
        ),
        (
            spec(additional_wrappers=(
                WrapperSpec("x", "gymnasium.wrappers.rendering:RecordVideo", {"video_folder": "/x"}),
            )),
            "that write no files",
        ),
    ],
)  # fmt: skip
def test_what_a_table_may_not_name(stored, message):
    with pytest.raises(DatasetError, match=message):
        recorded_env_maker(stored)()


def test_wrappers_of_gymnasium_are_made():
    wrapper = WrapperSpec("TimeAware", "gymnasium.wrappers.stateful_observation:TimeAwareObservation", {
        "flatten": True, "normalize_time": False, "dict_time_key": "time",
    })  # fmt: skip
    made = recorded_env_maker(spec(additional_wrappers=(wrapper,), max_episode_steps=9))()
    assert made.observation_space.shape == (4,)
