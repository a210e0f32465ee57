"""Published files and plain tables: D4RL's rules, late rewards, where episodes end; formats."""

import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from small_logs import (
    SHARED,
    assert_counted,
    counted,
    ends_of,
    first,
    marked,
    refused,
    save,
    shared,
)
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from iql_torchrl.data import DatasetWarning, load_dataset


def walk(*lengths, successors=False):
    """``counted`` with D4RL's names, and its ends."""
    rows, ends = counted(*lengths), ends_of(lengths)
    data = {f"{name}s": rows[name] for name in ("observation", "action", "reward")}
    data["rewards"] = data["observations"][:, 0]
    if successors:
        data["next_observations"] = rows["next_observation"]
    return data | {"terminals": ends & False, "timeouts": ends}, ends


@shared
def test_door_follows_d4rl_but_for_the_last_row():
    path = SHARED / "d4rl_door_human_v0.hdf5"
    with h5py.File(path) as file:
        observations, timeouts = (file[k][:] for k in ("observations", "timeouts"))
    with pytest.warns(DatasetWarning, match="24 of the 25 rows flagged truncated.*may be wrong"):
        dataset = load_dataset(path, reference_scores="door")
    # D4RL's qlearning_dataset keeps the rows that are neither the file's last one nor a timeout.
    rows, kept = dataset.transitions, np.flatnonzero(~timeouts[:-1])
    # D4RL: 6703 of 6729. One more here: the file's last row, a termination, needs no successor.
    assert len(kept) == 6703
    assert len(dataset) == 6704
    assert np.array_equal(rows["observation"][:-1].numpy(), observations[kept])
    going_on = ~rows["next", "terminated"][:-1, 0].numpy()
    following = rows["next", "observation"][:-1].numpy()
    assert np.array_equal(following[going_on], observations[kept + 1][going_on])
    assert int(rows["next", "terminated"].sum()) == 25
    # The file's timeouts lie within the 25 demonstrations, 200 steps in: 50 stretches.
    assert len(dataset.episode_lengths) == 50
    assert any("may be wrong" in note for note in dataset.notes)
    dataset = load_dataset(path, columns={"truncated": None})  # complete demonstrations
    assert len(dataset) == 6729
    assert len(dataset.episode_lengths) == 25
    rows, ended = dataset.transitions, dataset.transitions["next", "terminated"][:, 0]
    following = rows["observation"][1:][~ended[:-1]]
    assert torch.equal(rows["next", "observation"][:-1][~ended[:-1]], following)
    assert torch.equal(rows["next", "observation"][ended], rows["observation"][ended])


@shared
def test_halfcheetah_archive():
    dataset = load_dataset(SHARED / "halfcheetah_medium.npz", reward="return_range")
    assert round(dataset.episode_returns.mean()) == 5646
    assert round(dataset.episode_returns.std()) == 122
    mapped = dataset.transitions["next", "reward"].view(100, 1000).double().sum(1)
    assert np.isclose(float(mapped.max() - mapped.min()), 1000, rtol=1e-5)
    statistics = dataset.statistics["observation"]
    observations = dataset.transitions["observation"].double()
    assert torch.allclose(statistics.mean.double(), observations.mean(0), atol=1e-6)
    assert torch.allclose(statistics.std.double(), observations.std(0, correction=0), rtol=1e-5)


# -- where episodes end, and what follows a row


def test_breaks_in_the_successors_and_step_limits_cut_episodes():
    data, _ = walk(4, 1, 6, successors=True)
    del data["timeouts"]
    data["terminals"][3] = True
    dataset = load_dataset(data)
    assert dataset.episode_lengths.tolist() == [4, 1, 6]
    assert marked(dataset) == ([3], [4, 10])
    data, _ = walk(11, successors=True)
    del data["timeouts"]
    assert load_dataset(data, max_episode_steps=4).episode_lengths.tolist() == [4, 4, 3]


@pytest.mark.parametrize("terminal", [False, True])
def test_without_successors_the_next_row_is_one(terminal):
    data = counted(4, 3, terminated=[0, 1] if terminal else [])
    del data["next_observation"]
    dataset = load_dataset(data)
    assert_counted(dataset, [4, 3], [0, 1] if terminal else [])
    assert dataset.transitions["next", "done"].sum() == 2
    assert terminal or any("dropped 2 truncated" in note for note in dataset.notes)


def test_late_rewards_are_shifted_and_ends_move_with_them():
    data, ends = walk(4, 3)
    data["terminals"] = ends & (np.arange(7) < 4)
    data["timeouts"] = ends & (np.arange(7) >= 4)
    dataset = load_dataset(data, reward_offset=1)
    assert first(dataset, ("next", "reward")) == [1, 2, 3, 101, 102]
    assert marked(dataset) == ([2], [4])


def test_mask_successors_come_from_the_next_row():
    data, _ = walk(3, 2, successors=True)
    mask = np.ones((5, 4), bool)
    mask[1:, 3] = False
    data |= {"actions": np.zeros(5, int), "action_mask": mask}
    own = data | {"next_action_mask": mask[::-1]}
    for columns, expected in ((data, [0, 0, 1, 0, 1]), (own, [0, 0, 0, 0, 1])):
        assert load_dataset(columns).transitions["next", "action_mask"][:, 3].tolist() == expected
    unmasked = load_dataset(own, columns={"action_mask": None}, action_space=gym.spaces.Discrete(4))
    assert "action_mask" not in unmasked.transitions["next"].sorted_keys


# -- one dataset in every format


@pytest.mark.parametrize("suffix", ["csv", "npz", "h5", "hdf5"])
def test_files_are_read_as_dicts_are_and_damaged_ones_named(tmp_path, suffix):
    data, _ = walk(40, 30, successors=True)
    one = {key: data[key][:, :1] for key in ("observations", "next_observations")}
    data |= one | {"actions": np.arange(70) % 3}
    before = {key: values.copy() for key, values in data.items()}
    path = save(tmp_path / f"log.{suffix}", data)
    expected, dataset = load_dataset(data), load_dataset(path, memmap=tmp_path / "table")
    assert dataset.action_space == expected.action_space == gym.spaces.Discrete(3)
    assert (dataset.transitions == expected.transitions).all()
    assert dataset.episode_lengths.tolist() == [40, 30]
    load_dataset(data, reward="minus_one")
    assert all(np.array_equal(before[key], data[key]) for key in data)  # sources stay
    for content in (path.read_bytes()[:700], b"") if suffix != "csv" else ():
        path.write_bytes(content)
        refused(f"{path.name}: not a complete ", path, memmap=tmp_path / "other")
    path.unlink()
    refused("no such file", path, memmap=tmp_path / "other")


CSV = (
    "observations.0,observations.1,actions.0,rewards,terminals,note\n"
    '0.1,0.2,0.5,1,False,"a, b"\n0.3,0.1,-0.5,0,False,\n\n0.4,0,1e-1,2,True,c\n'
)


def test_csv_files(tmp_path):
    """Columns of several numbers, flags in words, text that nothing reads; short and damaged lines."""
    path, env = tmp_path / "log.csv", "MountainCarContinuous-v0"
    path.write_text(CSV)
    rows = load_dataset(path, env=env).transitions
    assert rows["observation"].tolist() == np.float32([[0.1, 0.2], [0.3, 0.1], [0.4, 0]]).tolist()
    assert rows["action"].tolist() == np.float32([[0.5], [-0.5], [0.1]]).tolist()
    assert rows["next", "terminated"].flatten().tolist() == [False, False, True]
    # The number in the name of a column is its place. The last row has no successor.
    swapped = "observations.1,actions.0,observations.0,rewards,terminals\n"
    path.write_text(f"{swapped}2.5,0.5,1.5,1,TRUE\n4.5,0.1,3.5,0,false\n")
    rows = load_dataset(path, env=env).transitions
    assert rows["observation"].tolist() == [[1.5, 2.5]]
    assert rows["next", "terminated"].tolist() == [[True]]
    for wrong, words in (
        (CSV.replace("-0.5", "-0.5x"), "log.csv: action has "),
        (CSV.replace("1e-1,", ""), "log.csv: row 2 has 5 cells; expected 6"),
        (CSV.replace("note", "observations"), "the columns of 'observations' are"),
        (CSV.replace("note", "observations.3"), "or observations.0, observations.1 and so on"),
    ):
        path.write_text(wrong)
        refused(words, path, env=env)


NUMBERED = "episode,observation.0,action,reward,terminated,truncated\n"


@pytest.mark.parametrize("first", [10**18, 2**63 - 2, -(2**63)])
def test_csv_files_number_episodes_by_all_integers_of_64_bits(tmp_path, first):
    """Neighbouring numbers, such as times in nanoseconds, differ by less than a float64 can."""
    lines = (f"{first + row // 3},{row / 2},{row % 2},1,0,0\n" for row in range(6))
    path = tmp_path / "log.csv"
    path.write_text(NUMBERED + "".join(lines))
    assert load_dataset(path).episode_lengths.tolist() == [2, 2]


def test_ids_of_more_than_64_bits_in_csv_files_are_told_apart(tmp_path):
    """As rewards such integers are floats."""
    lines = (f"{10**20 + row // 3},{row / 2},{row % 2},{10**29},0,0\n" for row in range(6))
    path = tmp_path / "log.csv"
    path.write_text(NUMBERED + "".join(lines))
    dataset = load_dataset(path)
    assert dataset.episode_lengths.tolist() == [2, 2]
    rewards = dataset.transitions["next", "reward"].flatten().tolist()
    assert rewards == np.full(4, 1e29, np.float32).tolist()


def test_a_list_of_columns_is_a_vector_of_floats(tmp_path):
    """Also of integers, which alone are categories; in the order of the list."""
    path = tmp_path / "log.csv"
    path.write_text(
        "age,pressure,push.x,push.y,reward,end,after_age,after_pressure\n"
        "58,70.5,0.5,1,1,0,59,71.5\n59,71.5,-0.5,0,2,1,60,72.5\n"
    )
    columns = {
        "observation": ["pressure", "age"],
        "next_observation": ("after_pressure", "after_age"),
        "action": ["push.y", "push.x"],
        "terminated": "end",
    }
    for memmap in (None, tmp_path / "table", tmp_path / "table"):
        dataset = load_dataset(path, columns=columns, max_episode_steps=5, memmap=memmap)
        assert dataset.observation_space == gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        rows = dataset.transitions
        assert rows["observation"].tolist() == [[70.5, 58.0], [71.5, 59.0]]
        assert rows["next", "observation"].tolist() == [[71.5, 59.0], [72.5, 60.0]]
        assert rows["action"].tolist() == [[1.0, 0.5], [0.0, -0.5]]
    columns |= {"observation": ["age", "pressure"], "next_observation": None}
    dataset = load_dataset(path, columns=columns, max_episode_steps=5, memmap=tmp_path / "table")
    assert dataset.transitions["observation"].tolist() == [[58.0, 70.5], [59.0, 71.5]]


def test_tensordicts_buffers_and_storages_agree():
    data, ends = walk(4, 3, successors=True)
    after = {
        "observation": data["next_observations"], "reward": data["rewards"][:, None],
        "terminated": data["terminals"][:, None], "done": ends[:, None],
    }  # fmt: skip
    table = {"observation": data["observations"], "action": data["actions"], "next": after}
    table = TensorDict(table, [7])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=2)
    buffer.extend(table)
    for source in (table, buffer, buffer.storage):
        dataset = load_dataset(source)
        assert dataset.episode_lengths.tolist() == [4, 3]
        for key in ("observation", "action", ("next", "observation"), ("next", "done")):
            assert torch.equal(dataset.transitions[key], table[key])
    refused("the replay buffer is empty", TensorDictReplayBuffer(storage=LazyTensorStorage(20)))
    numbers = ReplayBuffer(storage=LazyTensorStorage(20))
    numbers.extend(torch.ones(3))
    refused("the storage has Tensor values; expected TensorDicts", numbers)
    steps = torch.arange(12.0).view(3, 4, 1)  # trajectories, flattened in time
    truncated, terminated = torch.zeros(2, 3, 4, 1, dtype=torch.bool)
    truncated[:, -1] = terminated[1, 1] = True
    after = {"observation": steps + 1, "reward": steps}
    after |= {"terminated": terminated, "truncated": truncated}
    batches = TensorDict({"observation": steps, "action": 0 * steps, "next": after}, [3, 4])
    assert load_dataset(batches).episode_lengths.tolist() == [4, 2, 2, 4]
    again = load_dataset(load_dataset(table).transitions)
    assert (again.transitions == load_dataset(table).transitions).all()


def test_npz_files_of_other_things_and_other_containers(tmp_path):
    none, path = np.array([None] * 7), tmp_path / "log.npz"
    assert len(load_dataset(save(path, {**walk(4, 3)[0], "infos": none}))) == 5
    refused("log.npz: reward has Python objects", save(path, {**walk(4, 3)[0], "rewards": none}))
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    refused("log.npz: contains one array of shape (3,)", path)
    refused("int cannot be read", 3)
    refused("batch dimension", TensorDict({"observation": torch.ones(3)}, []))
    refused("empty list", [])


def test_parts_of_virtual_hdf5_datasets_are_required_and_digested(tmp_path):
    data, part, whole = walk(10, 10)[0], tmp_path / "part.h5", tmp_path / "whole.h5"
    reward = data.pop("rewards")
    layout = h5py.VirtualLayout((20,), np.float32)
    layout[:] = h5py.VirtualSource("part.h5", "rewards", (20,), np.float32)
    save(whole, data)
    with h5py.File(whole, "a") as file:
        file.create_virtual_dataset("rewards", layout)
    early = Path(shutil.copy(whole, tmp_path / "early.h5"))  # an error keeps its file open
    refused("early.h5: takes |part.h5, which does not exist", early)
    expected = load_dataset({**data, "rewards": reward}).episode_returns
    for factor in (1, 3):
        save(part, {"rewards": factor * reward})
        returns = load_dataset(whole, memmap=tmp_path / "table").episode_returns
        assert np.allclose(returns, factor * expected)


def test_spaces_come_from_the_environment():
    data, _ = walk(4, 3)
    data["observations"] = np.repeat(data["observations"][:, :1], 3, axis=1) / 1000
    spec = gym.spec("Pendulum-v1")
    for env in ("Pendulum-v1", spec, gym.make(spec), lambda: gym.make(spec)):
        dataset = load_dataset(data, env=env)
        assert dataset.action_spec.space.high.item() == 2.0
        assert dataset.make_env() is not dataset.make_env()
