"""Files that name other places, pickles in tables, splits of Parquet files."""

from __future__ import annotations

import json

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from shard_logs import written

from iql_torchrl.data import load_dataset, load_shards
from iql_torchrl.data.readers.arrow import parquet_files
from iql_torchrl.data.readers.environments import recorded_env_maker
from iql_torchrl.data.saved import verify
from iql_torchrl.data.schema import DatasetError


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:\\x", "a\\b", ""])
def test_names_in_a_record_lead_below_the_folder(tmp_path, name):
    written(tmp_path, [3, 3], 2)
    record = tmp_path / "shards" / "built.json"
    saved = json.loads(record.read_text())
    for files in ({**saved["files"], name: [1, "0"]}, {**saved["files"], "x": [1, name]}):
        record.write_text(json.dumps(saved | {"files": files}))
        for opened in (load_shards, verify, load_dataset):
            with pytest.raises(DatasetError, match="expected a path below its own folder"):
                opened(tmp_path / "shards")


def test_no_file_but_those_of_the_record_is_read(tmp_path):
    written(tmp_path, [3, 3], 1)
    (tmp_path / "shards" / "shard-00000" / "other.pickle").write_bytes(b"\x80 not a pickle")
    (tmp_path / "shards" / "shard-00000" / "meta.json").write_text("{")
    assert len(load_dataset(tmp_path / "shards")) == 6


def test_an_entry_of_a_record_is_a_file_of_the_record(tmp_path):
    written(tmp_path, [3, 3], 1)
    record = tmp_path / "shards" / "built.json"
    saved = json.loads(record.read_text())
    saved["entries"][0][0] = ["..", "..", "outside"]
    record.write_text(json.dumps(saved))
    (tmp_path / "outside.memmap").write_bytes(bytes(6 * 3 * 4))
    with pytest.raises(DatasetError, match=r"outside\.memmap is missing"):
        load_dataset(tmp_path / "shards")


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
