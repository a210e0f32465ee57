"""Published files and plain tables: D4RL's rules, late rewards, where episodes end."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from small_logs import Arrays, flag, walk
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")


def save(path: Path, data: Arrays) -> Path:
    """Writes an npz, HDF5 or CSV file, as its suffix says."""
    if path.suffix == ".npz":
        np.savez(path, **data)
    elif path.suffix == ".csv":
        names = [f"{k}.0" if v.ndim == 2 else k for k, v in data.items()]  # one number each
        cells = zip(*(v.ravel().tolist() for v in data.values()), strict=True)
        path.write_text("\n".join(",".join(map(str, line)) for line in (names, *cells)))
    else:
        with h5py.File(path, "w") as file:
            for key, values in data.items():
                file[key] = values
    return path


@shared
def test_door_follows_d4rl_but_for_the_last_row() -> None:
    path = SHARED / "d4rl_door_human_v0.hdf5"
    with h5py.File(path) as file:
        arrays = {k: file[k][:] for k in ("observations", "timeouts")}
    with pytest.warns(DatasetWarning, match="24 of the 25 rows marked truncated.*misplaced"):
        dataset = load_dataset(path, reference_scores="door")
    # D4RL's qlearning_dataset keeps the rows that are neither the file's last one nor a timeout.
    rows, kept = dataset.transitions, np.flatnonzero(~arrays["timeouts"][:-1])
    # D4RL: 6703 of 6729. One more here: the file's last row, a termination, needs no successor.
    assert len(kept) == 6703
    assert len(dataset) == 6704
    assert torch.equal(rows["observation"][:-1], torch.as_tensor(arrays["observations"][kept]))
    going_on = ~rows["next", "terminated"][:-1, 0].numpy()
    assert np.array_equal(
        rows["next", "observation"][:-1].numpy()[going_on],
        arrays["observations"][kept + 1][going_on],
    )
    assert int(rows["next", "terminated"].sum()) == 25
    # The file's timeouts lie within the 25 demonstrations, 200 steps in: 50 stretches.
    assert len(dataset.episode_lengths) == 50
    assert any("misplaced" in note for note in dataset.notes)


@shared
def test_door_without_its_timeouts_is_25_complete_demonstrations() -> None:
    dataset = load_dataset(SHARED / "d4rl_door_human_v0.hdf5", columns={"truncated": None})
    assert len(dataset) == 6729
    assert len(dataset.episode_lengths) == 25
    rows = dataset.transitions
    ended = rows["next", "terminated"][:, 0]
    following = rows["observation"][1:][~ended[:-1]]
    assert torch.equal(rows["next", "observation"][:-1][~ended[:-1]], following)
    assert torch.equal(rows["next", "observation"][ended], rows["observation"][ended])


@shared
def test_pendulum_rewards_meet_their_actions() -> None:
    dataset = load_dataset(
        SHARED / "d3rlpy_pendulum_replay.h5", env="Pendulum-v1", reward_offset=1,
        columns={"truncated": "episode_terminals"},
    )  # fmt: skip
    rows = dataset.transitions
    assert len(dataset) == 100_000 - 498
    cos, sin, speed = rows["observation"].double().unbind(-1)
    torque = rows["action"][:, 0].double().clamp(-2, 2)  # Stored in Newton metres, unscaled.
    angle = torch.atan2(sin, cos)
    formula = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    assert torch.allclose(rows["next", "reward"][:, 0].double(), formula, atol=1e-4)
    assert round(dataset.episode_returns.mean()) == -183
    assert int(rows["next", "truncated"].sum()) == 498
    assert not bool(rows["next", "terminated"].any())


@shared
def test_halfcheetah_archive() -> None:
    dataset = load_dataset(SHARED / "halfcheetah_medium.npz", reward="return_range")
    assert round(dataset.episode_returns.mean()) == 5646
    assert round(dataset.episode_returns.std()) == 122
    mapped = dataset.transitions["next", "reward"].view(100, 1000).double().sum(1)
    assert np.isclose(float(mapped.max() - mapped.min()), 1000, rtol=1e-5)
    raw = dataset.reward_map.inverse(mapped).numpy()
    assert np.allclose(raw, dataset.episode_returns, rtol=1e-5)
    statistics = dataset.statistics["observation"]
    observations = dataset.transitions["observation"].double()
    assert torch.allclose(statistics.mean.double(), observations.mean(0), atol=1e-6)
    assert torch.allclose(statistics.std.double(), observations.std(0, correction=0), rtol=1e-5)


def test_breaks_in_the_successors_and_step_limits_cut_episodes(tmp_path: Path) -> None:
    data, _ = walk(4, 1, 6)
    data["next_observations"] = data["observations"] + 1
    data["terminals"][3] = True
    dataset = load_dataset(save(tmp_path / "walk.hdf5", data))
    assert dataset.episode_lengths.tolist() == [4, 1, 6]
    assert (flag(dataset, "terminated"), flag(dataset, "truncated")) == ([3], [4, 10])
    data["observations"] = np.arange(11.0)[:, None]
    data.update(next_observations=data["observations"] + 1, terminals=np.zeros(11, bool))
    assert load_dataset(data, max_episode_steps=4).episode_lengths.tolist() == [4, 4, 3]


@pytest.mark.parametrize("terminal", [False, True])
def test_without_successors_the_next_row_is_one(terminal: bool) -> None:
    data, ends = walk(4, 3)
    data["timeouts"] = ends & False
    dataset = load_dataset(data | {"terminals" if terminal else "timeouts": ends})
    rows = dataset.transitions
    got = list(zip(*(rows[k].flatten().tolist() for k in ("observation", ("next", "observation"))),
                   strict=True))  # fmt: skip
    inside = [[(0, 1), (1, 2), (2, 3)], [(100, 101), (101, 102)]]
    if terminal:
        assert got == [*inside[0], (3, 3), *inside[1], (102, 102)]
        assert dataset.episode_lengths.tolist() == [4, 3]
    else:
        assert got == [*inside[0], *inside[1]]
        assert rows["next", "truncated"].flatten().tolist() == [False, False, True, False, True]
        assert any("dropped 2 truncated" in note for note in dataset.notes)
    assert rows["next", "done"].sum() == 2


def test_late_rewards_are_shifted_and_ends_move_with_them() -> None:
    data, ends = walk(4, 3)
    data["terminals"] = ends & (np.arange(7) < 4)
    data["timeouts"] = ends & (np.arange(7) >= 4)
    rows = load_dataset(data, reward_offset=1).transitions
    assert rows["next", "reward"].flatten().tolist() == [1, 2, 3, 101, 102]
    assert rows["next", "terminated"].flatten().tolist() == [False, False, True, False, False]
    assert rows["next", "truncated"].flatten().tolist() == [False] * 4 + [True]


def test_mask_successors_come_from_the_next_row() -> None:
    data, ends = walk(3, 2)
    data.update(timeouts=ends, next_observations=data["observations"] + 1, actions=np.zeros(5, int))
    mask = np.ones((5, 4), bool)
    mask[1:, 3] = False
    rows = load_dataset({**data, "action_mask": mask}).transitions
    assert rows["next", "action_mask"][:, 3].tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("name", ["cut.hdf5", "cut.h5", "cut.npz"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    data, ends = walk(40, 30)
    path = save(tmp_path / name, data | {"timeouts": ends})
    for content in (path.read_bytes()[:700], b""):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=name):
            load_dataset(path)
    with pytest.raises(DatasetError, match="no such file"):
        load_dataset(tmp_path / f"absent{path.suffix}")


@pytest.mark.parametrize("suffix", ["csv", "npz", "h5"])
def test_files_are_read_as_dicts_are(tmp_path: Path, suffix: str) -> None:
    data, ends = walk(4, 3)
    data.update(timeouts=ends, next_observations=data["observations"] + 1, actions=np.arange(7) % 3)
    path = save(tmp_path / f"log.{suffix}", data)
    expected, dataset = load_dataset(data), load_dataset(path, memmap=tmp_path / "table")
    assert dataset.action_space == expected.action_space == gym.spaces.Discrete(3)
    assert (dataset.transitions == expected.transitions).all()
    assert dataset.episode_lengths.tolist() == [4, 3]


def test_csv_files(tmp_path: Path) -> None:
    """Columns of several numbers, marks in words, text that nothing reads; short and damaged lines."""
    path, good = (
        tmp_path / "log.csv",
        (
            "observations.0,observations.1,actions.0,rewards,terminals,note\n"
            '0.1,0.2,0.5,1,False,"a, b"\n0.3,0.1,-0.5,0,False,\n\n0.4,0,1e-1,2,True,c\n'
        ),
    )
    path.write_text(good)
    rows = load_dataset(path, env="MountainCarContinuous-v0").transitions
    assert rows["observation"].tolist() == np.float32([[0.1, 0.2], [0.3, 0.1], [0.4, 0]]).tolist()
    assert rows["action"].tolist() == np.float32([[0.5], [-0.5], [0.1]]).tolist()
    assert rows["next", "terminated"].flatten().tolist() == [False, False, True]
    for wrong, words in (
        (good.replace("-0.5", "-0.5x"), r"log\.csv, column 'actions', row 1: .*'-0\.5x'; expected"),
        (good.replace("1e-1,", ""), r"log\.csv: row 2 has 5 cells; expected 6"),
        (good.splitlines()[0], "observation has 0 rows"),
        (good.replace("note", "rewards"), "the column 'rewards' occurs twice"),
        (good.replace("note", "observations"), "the columns of 'observations' are"),
        (good.replace("note", "observations.3"), "or observations.0, observations.1 and so on"),
        ("", "no column for observation"),
    ):
        path.write_text(wrong)
        with pytest.raises(DatasetError, match=words):
            load_dataset(path, env="MountainCarContinuous-v0")


def test_the_number_in_the_name_of_a_csv_column_is_its_place(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "observations.1,actions.0,observations.0,rewards,terminals\n2.5,0.5,1.5,1,TRUE\n4.5,0.1,3.5,0,false\n"
    )
    rows = load_dataset(path, env="MountainCarContinuous-v0").transitions
    assert rows["observation"].tolist() == [[1.5, 2.5]]  # the last row has no successor
    assert rows["next", "terminated"].tolist() == [[True]]


def test_tensordicts_buffers_and_storages_agree() -> None:
    data, ends = walk(4, 3)
    table = TensorDict(
        {
            "observation": data["observations"],
            "action": data["actions"],
            "next": {
                "observation": data["observations"] + 1, "reward": data["rewards"][:, None],
                "terminated": data["terminals"][:, None], "done": ends[:, None],
            },
        },
        [7],
    )  # fmt: skip
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=2)
    buffer.extend(table)
    for source in (table, buffer, buffer.storage):
        dataset = load_dataset(source)
        assert dataset.episode_lengths.tolist() == [4, 3]
        for key in ("observation", "action", ("next", "observation"), ("next", "done")):
            assert torch.equal(dataset.transitions[key], table[key])
    again = load_dataset(load_dataset(table).transitions)
    assert (again.transitions == load_dataset(table).transitions).all()


def test_batches_of_trajectories_are_flattened_in_time() -> None:
    steps = torch.arange(12.0).view(3, 4, 1)
    truncated, terminated = torch.zeros(2, 3, 4, 1, dtype=torch.bool)
    truncated[:, -1] = terminated[1, 1] = True
    after = {"observation": steps + 1, "reward": steps}
    after |= {"terminated": terminated, "truncated": truncated}
    table = TensorDict({"observation": steps, "action": 0 * steps, "next": after}, [3, 4])
    assert load_dataset(table).episode_lengths.tolist() == [4, 2, 2, 4]


def test_sources_are_not_changed() -> None:
    data, ends = walk(4, 3)
    data["timeouts"] = ends
    before = {key: values.copy() for key, values in data.items()}
    load_dataset(data, reward="minus_one")
    assert all(np.array_equal(before[key], data[key]) for key in data)


def test_spaces_come_from_the_environment() -> None:
    data, ends = walk(4, 3)
    data["timeouts"] = ends
    data["observations"] = np.repeat(data["observations"], 3, axis=1) / 1000
    for env in ("Pendulum-v1", gym.spec("Pendulum-v1"), lambda: gym.make("Pendulum-v1")):
        dataset = load_dataset(data, env=env)
        assert dataset.action_spec.space.high.item() == 2.0
        assert dataset.make_env() is not dataset.make_env()
