"""d3rlpy's files and buffers, compared with the transitions that d3rlpy itself makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data" / "d3rlpy_pendulum_replay.h5"
Episodes = list[dict[str, Any]]


def recorded(lengths: tuple[int, ...] = (4, 1, 6, 3), *, discrete: bool = False) -> Episodes:
    """Episodes as d3rlpy 2 stores them; step n of episode t has the observation 100 t + n.

    The second and the last terminate.
    """
    generator = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(lengths):
        actions = (
            generator.integers(0, 3, (length, 1))
            if discrete
            else generator.uniform(-1, 1, (length, 2)).astype(np.float32)
        )
        steps = 100.0 * number + np.arange(length)
        episodes.append(
            {
                "observations": np.stack([steps, -steps], 1).astype(np.float32),
                "actions": actions,
                "rewards": generator.normal(size=(length, 1)).astype(np.float32),
                "terminated": number in (1, len(lengths) - 1),
            }
        )
    return episodes


def dump(path: Path, episodes: Episodes, version: str = "2.1") -> Path:
    """The layout of d3rlpy 2.8.1's ``dump``, written by hand."""
    with h5py.File(path, "w") as file:
        file["columns"] = list(episodes[0])
        file["num_episodes"] = len(episodes)
        for number, episode in enumerate(episodes):
            for key, values in episode.items():
                for part, array in enumerate(values if isinstance(values, list) else ()):
                    file[f"{key}_{number}_{part}"] = array
                if not isinstance(values, list):
                    file[f"{key}_{number}"] = values
        file["version"] = version
    return path


def table(dataset: Any, key: Any) -> np.ndarray:
    return dataset.transitions[key].numpy()


def test_hand_written_file(tmp_path: Path) -> None:
    episodes = recorded()
    dataset = load_dataset(dump(tmp_path / "d.h5", episodes))
    # 4 - 1 (truncated: its last row has no successor), 1 (terminated), 6 - 1, 3 (terminated).
    assert dataset.episode_lengths.tolist() == [3, 1, 5, 3]
    observation = [0, 1, 2, 100, 200, 201, 202, 203, 204, 300, 301, 302]
    successors = [1, 2, 3, 100, 201, 202, 203, 204, 205, 301, 302, 302]
    assert table(dataset, "observation")[:, 0].tolist() == observation
    assert table(dataset, ("next", "observation"))[:, 0].tolist() == successors
    kept = [slice(3), slice(1), slice(5), slice(3)]
    for key, ours in (("actions", "action"), ("rewards", ("next", "reward"))):
        expected = np.concatenate([e[key][k] for e, k in zip(episodes, kept, strict=True)])
        assert np.array_equal(table(dataset, ours), expected)
    assert np.flatnonzero(table(dataset, ("next", "terminated"))).tolist() == [3, 11]
    assert np.flatnonzero(table(dataset, ("next", "truncated"))).tolist() == [2, 8]
    assert any("dropped 2 truncated last rows" in note for note in dataset.notes)


def test_several_observations_become_a_dict(tmp_path: Path) -> None:
    episodes = recorded()
    for episode in episodes:
        pictures = np.repeat(episode["observations"][:, :1] % 100, 12, axis=1)
        episode["observations"] = [
            episode["observations"],
            pictures.reshape(-1, 3, 2, 2).astype(np.uint8),
        ]
    dataset = load_dataset(dump(tmp_path / "d.hdf5", episodes))
    pictures = dataset.transitions["observation", "1"]
    assert pictures.dtype == torch.uint8
    assert pictures[:, 2, 1, 1].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2]
    assert dataset.transitions["next", "observation", "0"][:3, 0].tolist() == [1, 2, 3]


def test_discrete_actions_are_categories(tmp_path: Path) -> None:
    dataset = load_dataset(dump(tmp_path / "d.h5", recorded(discrete=True)))
    assert dataset.transitions["action"].dtype == torch.int64
    assert dataset.action_spec.n == 3


def lacking(name: str) -> Any:
    return lambda file: file.pop(name)


def replaced(name: str, values: Any) -> Any:
    def change(file: Any) -> None:
        del file[name]
        file[name] = values

    return change


def of_format_2_0(file: Any) -> None:
    file["total_size"] = file["num_episodes"][()]
    del file["num_episodes"]


BAD = {
    "an array is missing": (lacking("rewards_2"), ["episode 2", "rewards_2"]),
    "the mark is missing": (lacking("terminated_3"), ["episode 3", "terminated_3"]),
    "fewer rewards": (
        replaced("rewards_2", np.zeros((5, 1), "f4")), ["rewards", "episode 2", "(5, 1)"],
    ),
    "another width": (
        replaced("observations_1", np.zeros((1, 3), "f4")), ["observations", "episode 1", "(1, 3)"],
    ),
    "another dtype": (replaced("actions_3", np.zeros((3, 2))), ["actions", "episode 3", "float64"]),
    "no episodes": (replaced("num_episodes", 0), ["no episodes"]),
    "the obsolete format": (of_format_2_0, ["2.0", "write it again"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    path = dump(tmp_path / "d.h5", recorded())
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = dump(tmp_path / "d.h5", recorded((300, 200)))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DatasetError, match=r"d\.h5: not a complete HDF5 file"):
        load_dataset(path)


def old_file(path: Path, *, version: bool) -> Path:
    """The layout of ``MDPDataset.dump`` of d3rlpy 1.1.1 (``version``) and 0.91."""
    steps = np.array([0, 1, 2, 3, 100, 101, 102, 200, 201, 202], np.float32)
    with h5py.File(path, "w") as file:
        file["observations"] = np.stack([steps, -steps], 1)
        file["actions"] = np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
        file["rewards"] = steps
        file["terminals"] = np.isin(steps, [3]).astype(np.float32)
        file["episode_terminals"] = np.isin(steps, [3, 102, 202]).astype(np.float32)
        file["discrete_action"] = False
        if version:
            file["version"] = "1.0"
    return path


def test_files_of_d3rlpy_1(tmp_path: Path) -> None:
    dataset = load_dataset(old_file(tmp_path / "v1.h5", version=True))
    assert dataset.episode_lengths.tolist() == [4, 2, 2]
    assert table(dataset, ("next", "reward"))[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 200, 201]
    assert np.flatnonzero(table(dataset, ("next", "terminated"))).tolist() == [3]
    assert np.flatnonzero(table(dataset, ("next", "truncated"))).tolist() == [5, 7]
    assert any("episode_terminals" in note for note in dataset.notes)


def test_files_before_d3rlpy_1_1_have_late_rewards(tmp_path: Path) -> None:
    path = old_file(tmp_path / "v0.h5", version=False)
    with pytest.warns(DatasetWarning, match="reward_offset=1"):
        load_dataset(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DatasetWarning)
        dataset = load_dataset(path, reward_offset=1)
    # d3rlpy 0.91: transition i has rewards[i + 1], and the last one of an episode its terminal.
    assert table(dataset, ("next", "reward"))[:, 0].tolist() == [1, 2, 3, 101, 102, 201, 202]
    assert np.flatnonzero(table(dataset, ("next", "terminated"))).tolist() == [2]


@pytest.mark.skipif(not SHARED.is_file(), reason="needs the shared data folder")
def test_a_published_file_of_d3rlpy_0() -> None:
    """Its rewards are those of the actions of the rows before; no ``columns`` are needed."""
    dataset = load_dataset(SHARED, env="Pendulum-v1", reward_offset=1)
    assert len(dataset) == 100_000 - 498
    rows = dataset.transitions
    cos, sin, speed = rows["observation"].double().unbind(-1)
    torque = rows["action"][:, 0].double().clamp(-2, 2)
    formula = -(torch.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    assert torch.allclose(rows["next", "reward"][:, 0].double(), formula, atol=1e-4)
    with pytest.warns(DatasetWarning, match="reward_offset=1"):
        load_dataset(SHARED, env="Pendulum-v1")


@pytest.fixture(scope="module")
def d3rlpy() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an optional package says on import
        return pytest.importorskip("d3rlpy")


def by_d3rlpy(buffer: Any) -> dict[Any, np.ndarray]:
    """Every transition that d3rlpy samples from."""
    rows = [
        buffer.transition_picker(episode, index)
        for episode in buffer.episodes
        for index in range(episode.transition_count)
    ]
    return {
        "observation": np.stack([row.observation for row in rows]),
        "action": np.stack([row.action for row in rows]),
        ("next", "reward"): np.stack([row.reward for row in rows]),
        ("next", "observation"): np.stack([row.next_observation for row in rows]),
        ("next", "terminated"): np.array([[row.terminal] for row in rows]),
    }


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("kind", ["object", "file"])
def test_equal_to_d3rlpys_own_transitions(
    d3rlpy: Any, discrete: bool, kind: str, tmp_path: Path
) -> None:
    rows = recorded((40, 1, 7, 30), discrete=discrete)
    ends = np.cumsum([len(row["actions"]) for row in rows]) - 1
    terminals, timeouts = np.zeros((2, ends[-1] + 1), np.float32)
    for end, row in zip(ends, rows, strict=True):
        (terminals if row["terminated"] else timeouts)[end] = 1
    joined = {
        key: np.concatenate([row[key] for row in rows]) for key in rows[0] if key != "terminated"
    }
    buffer = d3rlpy.dataset.MDPDataset(**joined, terminals=terminals, timeouts=timeouts)
    source = buffer
    if kind == "file":
        source = tmp_path / "d.h5"
        with open(source, "w+b") as file:
            buffer.dump(file)
    dataset = load_dataset(source)
    expected = by_d3rlpy(buffer)
    continues = ~expected["next", "terminated"][:, 0].astype(bool)
    for key, values in expected.items():
        ours = table(dataset, key).reshape(values.shape)
        # d3rlpy has zeros as the next observation of a termination; its value is never used.
        chosen = continues if key == ("next", "observation") else slice(None)
        assert np.array_equal(ours[chosen], values[chosen]), key
    assert len(dataset) == buffer.transition_count


def test_unused_transition_pickers_are_named_and_the_number_of_actions_is_the_buffers(
    d3rlpy: Any,
) -> None:
    episodes = [d3rlpy.dataset.Episode(**row) for row in recorded(discrete=True)]
    picker = d3rlpy.dataset.MultiStepTransitionPicker(3, 0.9)
    buffer = d3rlpy.dataset.ReplayBuffer(
        d3rlpy.dataset.InfiniteBuffer(), episodes=episodes, action_size=7, transition_picker=picker
    )
    with pytest.warns(DatasetWarning, match="MultiStepTransitionPicker is not applied"):
        assert load_dataset(buffer).action_spec.n == 7
