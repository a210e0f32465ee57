"""Windows by masks, reference scores, categories that do not start at 0, selections of episodes."""

from __future__ import annotations

import json

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from shard_logs import written
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from iql_torchrl import evaluate, load_dataset
from iql_torchrl.data import load_shards
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.reuse import identity
from iql_torchrl.data.scaling import StatisticsAccumulator, known_scores
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.data.windows import Windows


def windows_of(rows: int) -> Windows:
    steps = torch.arange(float(rows)).unsqueeze(-1)
    table = TensorDict(
        {"observation": steps, "next": {"observation": steps + 1, "reward": steps}}, [rows]
    )
    return Windows(table, np.array([rows]), 2)


def test_a_mask_selects_rows():
    windows = windows_of(4)
    mask = torch.tensor([False, True, False, True])
    assert windows[mask]["next", "reward"].flatten().tolist() == [1, 3]
    assert windows[mask.tolist()]["next", "reward"].flatten().tolist() == [1, 3]
    with pytest.raises(IndexError, match=r"shape \(3,\).*4 rows"):
        windows[mask[:3]]


@pytest.mark.parametrize("scores", [[10, 0], [1.0, 1.0]])
def test_reference_scores_are_random_then_expert(scores):
    with pytest.raises(DatasetError, match="the second greater"):
        known_scores(scores)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_selection_of_episodes_is_part_of_the_identity(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    steps = {
        "observations": np.zeros((4, 2), np.float32), "actions": np.zeros((3, 1), np.float32),
        "rewards": np.ones(3), "terminations": np.arange(3) == 2, "truncations": np.zeros(3, bool),
    }  # fmt: skip
    unknown = ("code_permalink", "author", "author_email", "algorithm_name", "description")
    dataset = minari.create_dataset_from_buffers(
        "made/test-v0",
        [minari.data_collector.EpisodeBuffer(**steps) for _ in range(3)],
        observation_space=gym.spaces.Box(-9, 9, (2,)),
        action_space=gym.spaces.Box(-1, 1, (1,)),
        requirements=[],
        **dict.fromkeys(unknown, "none"),
    )
    first, second = (dataset.filter_episodes(lambda e, a=a: e.id != a) for a in (2, 0))
    identities = [
        identity(d, ReadOptions())["options"]["episodes"] for d in (dataset, first, second, [first])
    ]
    assert identities[0] == "[]"
    assert identities[1] != identities[2]
    assert identities[1] == identities[3]


def test_equal_scores_of_a_record_are_refused(tmp_path):
    written(tmp_path, [3, 3], 1)
    record = tmp_path / "shards" / "built.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"reference_scores": [1.0, 1.0]}))
    with pytest.raises(DatasetError, match="the second greater"):
        load_shards(tmp_path / "shards")


CHOICES = gym.spaces.MultiDiscrete([3, 2], start=[1, -1])


class Counting(gym.Env):
    """Observes (1, -1), (2, 0), (3, -1), ...; ends after three steps; actions 5 and 6."""

    observation_space = CHOICES
    action_space = gym.spaces.Discrete(2, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        return np.array([1, -1]), {}

    def step(self, action):
        assert action in (5, 6)
        self.step_number += 1
        number = self.step_number
        return np.array([1 + number % 3, number % 2 - 1]), float(action), number == 3, False, {}


def test_categories_of_tables_count_from_0_whatever_their_space_starts_with(tmp_path):
    """Both sides of observations, actions, in memory and in a memory map; as policies read them."""
    raw = np.array([[1, -1], [2, 0], [3, -1]])
    table = {
        "observation": raw, "next_observation": np.array([[2, 0], [3, -1], [1, 0]]),
        "action": np.array([5, 6, 5]), "reward": np.array([5.0, 6.0, 5.0], np.float32),
        "terminated": np.array([False, False, True]), "truncated": np.zeros(3, bool),
    }  # fmt: skip
    for place in (None, tmp_path / "map", tmp_path / "map"):  # the last one is read from the map
        dataset = load_dataset(table, env=Counting, memmap=place)
        rows = dataset.transitions
        assert rows["observation"].tolist() == [[0, 0], [1, 1], [2, 0]]
        assert rows["next", "observation"].tolist() == [[1, 1], [2, 0], [0, 1]]
        assert rows["action"].tolist() == [0, 1, 0]
        assert dataset.observation_space == CHOICES
        assert dataset.action_spec.is_in(rows["action"])
    seen = []

    def choose(observation):
        seen.append(observation.tolist())
        return observation[:, 1]

    policy = TensorDictModule(choose, ["observation"], ["action"])
    result = evaluate(policy, dataset.make_env, episodes=1, seed=0)
    assert [row for (row,) in seen] == rows["observation"].tolist()
    assert result.returns.tolist() == [16.0]  # actions 5, 6, 5


def test_a_category_below_the_start_is_refused():
    table = {
        "observation": np.array([[1, -1], [0, 0]]), "next_observation": np.array([[1, 0], [1, 0]]),
        "action": np.zeros((2, 1), np.float32), "reward": np.zeros(2, np.float32),
        "terminated": np.array([False, True]), "truncated": np.zeros(2, bool),
    }  # fmt: skip
    with pytest.raises(DatasetError, match=r"observation is out of range.*row 1.*start <= value"):
        load_dataset(table, observation_space=CHOICES)


@pytest.mark.parametrize("last", [[5.0, 5.0], [7.0, 7.0], [5.0, 6.0]])
def test_a_column_is_constant_only_over_all_blocks(last):
    """Two columns in blocks; the second one never changes. NumPy's numbers over all rows."""
    blocks = [np.array([[5.0, 1.0], [8.0, 1.0]]), np.array([[x, 1.0] for x in last])]
    running = StatisticsAccumulator((2,))
    for block in blocks:
        running.update(torch.tensor(block))
    found, rows = running.result(), np.concatenate(blocks)
    assert found.constant == (1,)
    assert found.count == 4
    assert (running.low.tolist(), running.high.tolist()) == (
        rows.min(0).tolist(), rows.max(0).tolist(),
    )  # fmt: skip
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, [rows[:, 0].std(), 1.0], rtol=1e-6)
