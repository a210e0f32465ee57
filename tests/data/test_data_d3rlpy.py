"""d3rlpy's files and buffers: the transitions that d3rlpy makes of them, by hand."""

import itertools
import tracemalloc
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from small_logs import SHARED, assert_counted, counted, first, marked, refused, save, shared

from iql_torchrl.data import DatasetWarning, load_dataset
from iql_torchrl.data.readers.d3rlpy import open_d3rlpy_file
from iql_torchrl.data.readers.options import ReadOptions

FILE = SHARED / "d3rlpy_pendulum_replay.h5"
LENGTHS = (4, 1, 6, 3)


def recorded(*, discrete=False):
    """Episodes as d3rlpy 2 stores them; the second and the last terminate."""
    rows, start = counted(*LENGTHS, terminated=[1, 3]), np.cumsum([0, *LENGTHS])
    if discrete:
        rows["action"] = np.random.default_rng(0).integers(0, 3, (start[-1], 1))
    return [
        {
            "observations": rows["observation"][first:last],
            "actions": rows["action"][first:last],
            "rewards": rows["reward"][first:last, None],
            "terminated": bool(rows["terminated"][last - 1]),
        }
        for first, last in itertools.pairwise(start)
    ]


def dump(path, episodes, version="2.1"):
    """The layout of d3rlpy 2.8.1's ``dump``, written by hand."""
    columns = {"columns": list(episodes[0]), "num_episodes": len(episodes), "version": version}
    for number, episode in enumerate(episodes):
        for key, values in episode.items():
            if isinstance(values, list):
                columns |= {f"{key}_{number}_{n}": part for n, part in enumerate(values)}
            else:
                columns[f"{key}_{number}"] = values
    return save(path, columns)


def test_hand_written_file(tmp_path):
    dataset = load_dataset(dump(tmp_path / "d.h5", recorded()))
    assert_counted(dataset, LENGTHS, [1, 3])
    actions, kept = counted(*LENGTHS)["action"], [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13]
    assert np.array_equal(dataset.transitions["action"].numpy(), actions[kept])
    assert any("dropped 2 truncated last rows" in note for note in dataset.notes)


def test_several_observations_become_a_dict_and_discrete_actions_categories(tmp_path):
    episodes = recorded(discrete=True)
    for episode in episodes:
        pictures = np.repeat(episode["observations"][:, :1] % 100, 12, axis=1)
        pictures = pictures.reshape(-1, 3, 2, 2).astype(np.uint8)
        episode["observations"] = [episode["observations"], pictures]
    dataset = load_dataset(dump(tmp_path / "d.hdf5", episodes))
    pictures = dataset.transitions["observation", "1"]
    assert pictures.dtype == torch.uint8
    assert pictures[:, 2, 1, 1].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2]
    assert first(dataset, ("next", "observation", "0"))[:3] == [1, 2, 3]
    assert dataset.transitions["action"].dtype == torch.int64
    assert dataset.action_spec.n == 3


def test_a_file_is_read_one_episode_after_the_other(tmp_path, monkeypatch):
    """Twenty episodes of 1 MB: with 2 MB kept, the slices of 1.5 MB need about 6 MB, not 20."""
    monkeypatch.setattr("iql_torchrl.data.readers.arrays.KEPT_BYTES", 2**21)
    episodes = [
        {
            "observations": np.full((256, 1024), number, np.float32),
            "actions": np.full((256, 1), number, np.float32),
            "rewards": np.arange(256, dtype=np.float32)[:, None],
            "terminated": number == 3,
        }
        for number in range(20)
    ]
    path = dump(tmp_path / "d.h5", episodes)
    tracemalloc.start()
    columns = open_d3rlpy_file(path, ReadOptions()).columns
    for start in range(0, 5120, 384):
        expected = np.arange(start, min(start + 384, 5120))
        observations = columns["observations"][start : start + 384]
        assert np.array_equal(observations[:, 1023], expected // 256)
        assert columns["rewards"][start : start + 384][:, 0].tolist() == (expected % 256).tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert np.flatnonzero(columns["terminals"][:]).tolist() == [3 * 256 + 255]
    assert np.flatnonzero(columns["timeouts"][:])[:4].tolist() == [255, 511, 767, 1279]


def lacking(name):
    return lambda file: file.pop(name)


def replaced(name, values):
    def change(file):
        del file[name]
        file[name] = values

    return change


def of_format_2_0(file):
    file["total_size"] = file["num_episodes"][()]
    del file["num_episodes"]


BAD = [
    (lacking("rewards_2"), "episode 2|rewards_2"),
    (lacking("terminated_3"), "episode 3|terminated_3"),
    (replaced("rewards_2", np.zeros((5, 1), "f4")), "rewards|episode 2|(5, 1)"),
    (replaced("observations_1", np.zeros((1, 3), "f4")), "observations|episode 1|(1, 3)"),
    (replaced("actions_3", np.zeros((3, 1))), "actions|episode 3|float64"),
    (replaced("num_episodes", 0), "no episodes"),
    (of_format_2_0, "2.0|write it again"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_files_are_refused(change, words, tmp_path):
    path = dump(tmp_path / "d.h5", recorded())
    with h5py.File(path, "a") as file:
        change(file)
    refused(words, path)


class Buffer:
    """What is read of d3rlpy's own buffers, which need its package."""

    __module__ = "d3rlpy.dataset"

    def __init__(self, episodes, **more):
        self.__dict__ |= {"episodes": [SimpleNamespace(**row) for row in episodes], **more}


class MultiStepTransitionPicker:
    pass


def test_buffers_have_the_rows_of_their_episodes():
    buffer = Buffer(recorded())
    assert_counted(load_dataset(buffer), LENGTHS, [1, 3])
    del buffer.episodes[2].terminated
    refused("Buffer: its episodes have no flag 'terminated'|method dump", buffer)
    discrete = SimpleNamespace(action_space=SimpleNamespace(name="DISCRETE"), action_size=7)
    picker = MultiStepTransitionPicker()
    buffer = Buffer(recorded(discrete=True), dataset_info=discrete, transition_picker=picker)
    with pytest.warns(DatasetWarning, match="MultiStepTransitionPicker is not applied"):
        assert load_dataset(buffer).action_spec.n == 7


def old_file(path, **more):
    """The layout of ``MDPDataset.dump`` of d3rlpy 0.91; 1.1.1 has ``version``, too."""
    rows = counted(4, 3, 3, terminated=[0])
    steps, ended = rows["observation"][:, 0], rows["terminated"]
    return save(path, {
        "observations": rows["observation"], "actions": rows["action"], "rewards": steps,
        "terminals": ended.astype(np.float32), "discrete_action": False,
        "episode_terminals": (ended | rows["truncated"]).astype(np.float32), **more,
    })  # fmt: skip


def test_files_of_d3rlpy_1(tmp_path):
    dataset = load_dataset(old_file(tmp_path / "v1.h5", version="1.0"))
    assert dataset.episode_lengths.tolist() == [4, 2, 2]
    assert first(dataset, ("next", "reward")) == [0, 1, 2, 3, 100, 101, 200, 201]
    assert marked(dataset) == ([3], [5, 7])
    assert any("episode_terminals" in note for note in dataset.notes)


def test_files_before_d3rlpy_1_1_have_late_rewards(tmp_path):
    path = old_file(tmp_path / "v0.h5")
    with pytest.warns(DatasetWarning, match="reward_offset=1"):
        load_dataset(path)
    refused("where episodes end", old_file(tmp_path / "v.h5", episode_terminals=np.zeros(9)))
    dataset = load_dataset(path, reward_offset=1)
    # d3rlpy 0.91: transition i has rewards[i + 1], and the last one of an episode its terminal.
    assert first(dataset, ("next", "reward")) == [1, 2, 3, 101, 102, 201, 202]
    assert marked(dataset)[0] == [2]


@shared
def test_a_published_file_of_d3rlpy_0():
    """Its rewards are those of the actions of the rows before; no ``columns`` are needed."""
    dataset = load_dataset(FILE, env="Pendulum-v1", reward_offset=1)
    assert len(dataset) == 100_000 - 498
    rows = dataset.transitions
    cos, sin, speed = rows["observation"].double().unbind(-1)
    torque = rows["action"][:, 0].double().clamp(-2, 2)  # Stored in Newton metres, unscaled.
    formula = -(torch.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    assert torch.allclose(rows["next", "reward"][:, 0].double(), formula, atol=1e-4)
    assert round(dataset.episode_returns.mean()) == -183
    assert list(map(len, marked(dataset))) == [0, 498]
    named = {"truncated": "episode_terminals"}
    named = load_dataset(FILE, env="Pendulum-v1", reward_offset=1, columns=named)
    assert named.fingerprint() == dataset.fingerprint()
    with pytest.warns(DatasetWarning, match="reward_offset=1"):
        load_dataset(FILE, env="Pendulum-v1")
