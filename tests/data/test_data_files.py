"""Published files and plain tables: D4RL's rules, late rewards, where episodes end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")


def d4rl_rule(observations: Any, terminals: Any, timeouts: Any) -> list[int]:
    """Rows D4RL's ``qlearning_dataset`` keeps: not the file's last, not a timeout."""
    return [i for i in range(len(observations) - 1) if not timeouts[i]]


@shared
def test_door_follows_d4rl_but_for_the_last_row() -> None:
    path = SHARED / "d4rl_door_human_v0.hdf5"
    with h5py.File(path) as file:
        arrays = {k: file[k][:] for k in ("observations", "terminals", "timeouts", "rewards")}
    with pytest.warns(DatasetWarning, match="24 of the 25 rows marked truncated.*misplaced"):
        dataset = load_dataset(path, reference_scores="door")
    rows, kept = dataset.transitions, d4rl_rule(**{k: arrays[k] for k in arrays if k != "rewards"})
    # D4RL: 6703 of 6729. One more here: the file's last row, a termination, needs no successor.
    assert len(kept) == 6703
    assert len(dataset) == 6704
    assert torch.equal(rows["observation"][:-1], torch.as_tensor(arrays["observations"][kept]))
    going_on = ~rows["next", "terminated"][:-1, 0].numpy()
    assert np.array_equal(
        rows["next", "observation"][:-1].numpy()[going_on],
        arrays["observations"][np.array(kept) + 1][going_on],
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


def walk(lengths: tuple[int, ...]) -> tuple[dict[str, Any], np.ndarray]:
    """Rows whose observation counts on within an episode and leaps between them."""
    rows = np.concatenate([np.arange(n) + 100.0 * i for i, n in enumerate(lengths)])
    last = np.cumsum(lengths) - 1
    ends = np.zeros(len(rows), bool)
    ends[last] = True
    data = {
        "observations": rows[:, None].astype(np.float32),
        "actions": np.linspace(-1, 1, len(rows), dtype=np.float32)[:, None],
        "rewards": rows.astype(np.float32),
        "terminals": np.zeros(len(rows), bool),
    }
    return data, ends


def test_breaks_in_the_successors_cut_episodes(tmp_path: Path) -> None:
    data, _ = walk((4, 1, 6))
    data["next_observations"] = data["observations"] + 1
    data["terminals"][3] = True
    with h5py.File(tmp_path / "walk.hdf5", "w") as file:
        for key, values in data.items():
            file[key] = values
    dataset = load_dataset(tmp_path / "walk.hdf5")
    assert dataset.episode_lengths.tolist() == [4, 1, 6]
    rows = dataset.transitions
    assert rows["next", "terminated"].flatten().nonzero().flatten().tolist() == [3]
    assert rows["next", "truncated"].flatten().nonzero().flatten().tolist() == [4, 10]


def test_step_limit_cuts_episodes() -> None:
    data, _ = walk((10,))
    data["next_observations"] = data["observations"] + 1
    assert load_dataset(data, max_episode_steps=4).episode_lengths.tolist() == [4, 4, 2]


@pytest.mark.parametrize("terminal", [False, True])
def test_without_successors_the_next_row_is_one(terminal: bool) -> None:
    data, ends = walk((4, 3))
    data["terminals" if terminal else "timeouts"] = ends
    data.setdefault("timeouts", np.zeros(7, bool))
    dataset = load_dataset(data)
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
    data, ends = walk((4, 3))
    data["terminals"] = ends & (np.arange(7) < 4)
    data["timeouts"] = ends & (np.arange(7) >= 4)
    rows = load_dataset(data, reward_offset=1).transitions
    assert rows["next", "reward"].flatten().tolist() == [1, 2, 3, 101, 102]
    assert rows["next", "terminated"].flatten().tolist() == [False, False, True, False, False]
    assert rows["next", "truncated"].flatten().tolist() == [False] * 4 + [True]


def test_mask_successors_come_from_the_next_row() -> None:
    data, ends = walk((3, 2))
    data.update(timeouts=ends, next_observations=data["observations"] + 1, actions=np.zeros(5, int))
    mask = np.ones((5, 4), bool)
    mask[1:, 3] = False
    rows = load_dataset({**data, "action_mask": mask}).transitions
    assert rows["next", "action_mask"][:, 3].tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("name", ["cut.hdf5", "cut.h5", "cut.npz"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    data, ends = walk((40, 30))
    path, whole = tmp_path / name, tmp_path / f"whole{Path(name).suffix}"
    data["timeouts"] = ends
    if whole.suffix == ".npz":
        np.savez(whole, **data)
    else:
        with h5py.File(whole, "w") as file:
            for key, values in data.items():
                file[key] = values
    path.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(DatasetError, match=name):
        load_dataset(path)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=name):
        load_dataset(path)
    with pytest.raises(DatasetError, match="no such file"):
        load_dataset(tmp_path / f"absent{path.suffix}")


def test_tensordicts_buffers_and_storages_agree() -> None:
    data, ends = walk((4, 3))
    table = TensorDict(
        {
            "observation": data["observations"],
            "action": data["actions"],
            "next": {
                "observation": data["observations"] + 1,
                "reward": data["rewards"][:, None],
                "terminated": torch.zeros(7, 1, dtype=torch.bool),
                "done": torch.as_tensor(ends)[:, None],
            },
        },
        [7],
    )
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
    table = TensorDict(
        {
            "observation": torch.arange(12.0).view(3, 4, 1),
            "action": torch.zeros(3, 4, 1),
            "next": {
                "observation": torch.arange(12.0).view(3, 4, 1) + 1,
                "reward": torch.arange(12.0).view(3, 4, 1),
                "terminated": torch.zeros(3, 4, 1, dtype=torch.bool),
                "truncated": torch.zeros(3, 4, 1, dtype=torch.bool),
            },
        },
        [3, 4],
    )
    table["next", "truncated"][:, -1] = True
    table["next", "terminated"][1, 1] = True
    assert load_dataset(table).episode_lengths.tolist() == [4, 2, 2, 4]


def test_sources_are_not_changed() -> None:
    data, ends = walk((4, 3))
    data["timeouts"] = ends
    before = {key: values.copy() for key, values in data.items()}
    load_dataset(data, reward="minus_one")
    assert all(np.array_equal(before[key], data[key]) for key in data)


def test_spaces_come_from_the_environment() -> None:
    data, ends = walk((4, 3))
    data["timeouts"] = ends
    data["observations"] = np.repeat(data["observations"], 3, axis=1) / 1000
    for env in ("Pendulum-v1", gym.spec("Pendulum-v1"), lambda: gym.make("Pendulum-v1")):
        dataset = load_dataset(data, env=env)
        assert dataset.action_spec.space.high.item() == 2.0
        assert dataset.make_env() is not dataset.make_env()
