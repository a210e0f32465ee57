"""A dataset: its text, parts, reward scaling, scores, statistics, and categories from any start."""

from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_agents import Walk, small_columns
from small_logs import numbered, refused
from tensordict.nn import TensorDictModule

from iql_torchrl import IQLConfig, evaluate
from iql_torchrl.data import RewardMap, load_dataset, normalised_score

LOG = numbered([10] * 20)


def test_a_dataset_is_four_lines_and_mapped_rewards_and_notes_are_named():
    rows = {name: values[:4] for name, values in small_columns(action=np.arange(40) % 4).items()}
    rows["reward"] = np.array([1.0, 2.0, 3.0, 4.5])
    rows["truncated"] = np.array([False, True, False, True])
    assert repr(replace(load_dataset(rows), name="four", notes=())).splitlines() == [
        "OfflineDataset 'four': 4 transitions in 2 episodes",
        "  observation: Box of shape (3,), float32, [-inf, inf]",
        "  action: Discrete(4)",
        "  raw return: mean 5.25, 3 to 7.5",
    ]
    text = repr(replace(load_dataset(rows, reward=(2.0, -1.0)), notes=("a", "b")))
    assert "mean 5.25, 3 to 7.5, rewards scaled by RewardMap(scale=2.0, shift=-1.0)" in text
    assert text.endswith("  notes: 2, see print_notes()")


def test_split_shares_scale_and_no_episode():
    whole = load_dataset(LOG, reward=(2.0, 1.0))
    first, second = whole.split(0.75, seed=0)
    assert (len(first), len(second)) == (150, 50)
    ids = [set(part.transitions["collector", "traj_ids"].tolist()) for part in (first, second)]
    assert not ids[0] & ids[1]
    assert first.statistics is whole.statistics
    assert second.reward_map == RewardMap(2.0, 1.0)
    again, _ = whole.split(0.75, seed=0)
    assert torch.equal(again.transitions["action"], first.transitions["action"])
    refused("empty", 0.001, whole.split, seed=0)


def test_the_range_of_goals_that_a_function_gives():
    goals = load_dataset(LOG).relabelled(lambda observation: 2 * observation[:, :1])
    assert goals.range_of(("next", "observation", "goal")) == (0, 2 * 199)
    assert goals.range_of(("observation", "observation")) == load_dataset(LOG).range_of(
        ("observation",)
    )


def test_reward_maps_invert():
    rewards = np.linspace(-5, 5, 11)
    change = RewardMap(0.25, -1.0)
    assert np.allclose(change.inverse(change.forward(rewards)), rewards)
    shifted, raw = load_dataset(LOG, reward="minus_one"), load_dataset(LOG)
    assert torch.equal(shifted.transitions["next", "reward"], raw.transitions["next", "reward"] - 1)
    assert np.array_equal(shifted.episode_returns, raw.episode_returns)
    assert normalised_score([0.0, 5.0], (0.0, 10.0)).tolist() == [0.0, 50.0]
    with pytest.raises(ValueError, match="expected two different returns"):
        normalised_score([0.0], (1.0, 1.0))
    for scores in ([10, 0], [1.0, 1.0], object()):  # random, expert
        refused("the second greater", LOG, reference_scores=scores)
    known = SimpleNamespace(ref_min_score=-2, ref_max_score=8)  # as Minari has them
    assert load_dataset(LOG, reference_scores=known).normalised_score(3.0) == 50.0


@pytest.mark.parametrize("last", [[5.0, 5.0], [7.0, 7.0], [5.0, 6.0]])
def test_a_column_is_constant_only_over_all_blocks(last, monkeypatch):
    """In blocks of two rows; the second column never changes. NumPy's numbers over all rows."""
    monkeypatch.setattr("iql_torchrl.data.build.CHUNK", 2)
    rows = np.array([[5.0, 1.0], [8.0, 1.0], *([x, 1.0] for x in last)], np.float32)
    data = {name: values[:4] for name, values in LOG.items()}
    following = rows + np.float32([1, 0])
    data.update(observation=rows, next_observation=following, truncated=np.ones(4, bool))
    dataset = load_dataset(data)
    result = dataset.statistics["observation"]
    assert (result.constant, result.count) == ((1,), 4)
    np.testing.assert_allclose(result.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result.std, [rows[:, 0].std(), 1.0], rtol=1e-6)


# -- categories that do not start at 0


CHOICES = gym.spaces.MultiDiscrete([3, 2], start=[1, -1])


def counting():
    """Observes (1, -1), (2, 0), (3, -1), ...; ends after three steps; the actions 5 and 6 are paid."""
    observe = lambda t: np.array([1 + t % 3, t % 2 - 1])  # noqa: E731
    actions = gym.spaces.Discrete(2, start=5)
    return Walk(CHOICES, actions, observe, lambda t, action: float(action), steps=3)


TABLE = {
    "observation": np.array([[1, -1], [2, 0], [3, -1]]),
    "next_observation": np.array([[2, 0], [3, -1], [1, 0]]),
    "action": np.array([5, 6, 5]), "reward": np.array([5.0, 6.0, 5.0], np.float32),
    "terminated": np.array([False, False, True]), "truncated": np.zeros(3, bool),
}  # fmt: skip


def test_categories_of_tables_count_from_0_whatever_their_space_starts_with(tmp_path):
    """Both sides of observations, actions, in memory and in a memory map; as policies read them."""
    for place in (None, tmp_path / "map", tmp_path / "map"):  # the last one is read from the map
        dataset = load_dataset(TABLE, env=counting, memmap=place)
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
    below = {**TABLE, "observation": TABLE["observation"] - [[0, 0], [2, 0], [0, 0]]}
    refused("observation is out of range|row 1|start <= value", below, env=counting)


def test_no_reward_scaling_is_the_raw_one():
    """What a config without a reward scaling asks for: ``load_dataset(..., reward=config.reward)``."""
    table = small_columns(20)
    assert load_dataset(table, reward=None).reward_map == load_dataset(table).reward_map
    assert load_dataset(table, reward=IQLConfig().reward).reward_map.scale == 1.0
