"""Episodes of one dataset are recognised in another, whatever happened to rewards, order and size."""

import numpy as np
import pytest
from small_agents import small_columns
from small_logs import numbered
from small_mdp import random_mdp, uniform

from iql_torchrl import load_dataset
from iql_torchrl.data.digests import SKETCH, shared_share, sketch_of


def steps(episodes, seed, length=3):
    return numbered([length] * episodes, seed)


def joined(one, other):
    return {name: np.concatenate([one[name], other[name]]) for name in one}


def share(one, other):
    """Of the episodes of ``other`` that are in ``one``."""
    return shared_share(sketch_of(one.episode_digests()), other.episode_digests())


def test_one_number_an_episode_whatever_the_reward_scaling_and_the_order():
    table = steps(50, 0)
    raw = load_dataset(table).episode_digests()
    assert (raw.shape, raw.dtype, len(np.unique(raw))) == ((50,), np.int64, 50)
    for reward in ((-250.0, 3.0), "return_range"):
        np.testing.assert_array_equal(load_dataset(table, reward=reward).episode_digests(), raw)
    backwards = np.arange(150).reshape(50, 3)[::-1].reshape(-1)
    moved = {name: column[backwards] for name, column in table.items()}
    np.testing.assert_array_equal(load_dataset(moved).episode_digests(), raw[::-1])
    both = load_dataset(table).split(0.4, 1)
    assert set(raw) == {*both[0].episode_digests(), *both[1].episode_digests()}


@pytest.mark.filterwarnings("ignore:.*next_observation:iql_torchrl.data.DatasetWarning")
@pytest.mark.parametrize("column", ["observation", "action", "reward"])
@pytest.mark.parametrize("row", [0, 2])
def test_another_first_or_last_step_is_another_episode(column, row):
    table = steps(4, 0)
    changed = {**table, column: table[column].copy()}
    changed[column][6 + row] *= 0.5
    raw, other = (load_dataset(each).episode_digests() for each in (table, changed))
    assert (raw == other).tolist() == [True, True, False, True]


def test_parts_of_a_dict_observation_and_categories_count():
    draw = np.random.default_rng(0)
    observation = {
        "x": draw.normal(size=(40, 2)).astype(np.float32),
        "k": draw.integers(3, size=40),
    }
    first = load_dataset(small_columns(observation=observation))
    observation["k"] = observation["k"].copy()
    observation["k"][0] = (observation["k"][0] + 1) % 3
    second = load_dataset(small_columns(observation=observation))
    equal = first.episode_digests() == second.episode_digests()
    assert equal.tolist() == [False, True, True, True]


def test_parts_of_one_dataset_share_nothing():
    one, other = load_dataset(steps(300, 0)).split(0.5, 0)
    assert share(one, other) == share(other, one) == 0
    assert share(one, one) == 1
    discrete = random_mdp().dataset(uniform(), episodes=1000).split(0.5, 0)
    digests = discrete[1].episode_digests()
    assert len(np.unique(digests)) < 0.9 * len(digests)  # many coincidences
    assert np.isin(digests, discrete[0].episode_digests()).mean() > 0.1
    assert share(*discrete) < 0.05
    assert share(discrete[0], discrete[0]) > 0.95


@pytest.mark.parametrize("reward", ["raw", "return_range"])
def test_a_share_of_continuous_episodes(reward):
    sizes = ((90, 0), (300, 1), (210, 2))
    common, other, fresh = (steps(episodes, seed) for episodes, seed in sizes)
    one = load_dataset(joined(common, other), reward=reward)
    assert share(one, load_dataset(joined(fresh, common))) == pytest.approx(0.3)


def test_a_share_of_episodes_that_repeat_themselves():
    fresh, rest = random_mdp().dataset(uniform(), episodes=1400, seed=3).split(350 / 1400, 0)
    parts = fresh, *rest.split(150 / 1050, 0)
    ends = [part.episode_digests() for part in parts]
    mixed = np.concatenate(ends[:2])
    seen = shared_share(sketch_of(np.concatenate(ends[1:])), mixed)
    assert seen == pytest.approx(0.3, abs=0.05)
    assert shared_share(sketch_of(ends[2]), mixed) < 0.05


@pytest.mark.parametrize(("fraction", "episodes"), [(0.95, 3000), (0.1, 3000), (0.5, 60)])
def test_coincidences_with_a_dataset_of_another_size(fraction, episodes):
    """A large dataset has more of the repeated episodes than a small part of it."""
    one, other = random_mdp().dataset(uniform(), episodes=episodes, seed=4).split(fraction, 0)
    assert share(one, other) < 0.05
    common = other.split(0.4, 0)[0]
    both = np.concatenate([one.episode_digests(), common.episode_digests()])
    assert shared_share(sketch_of(both), other.episode_digests()) > 0.15


def test_datasets_larger_than_the_sketch_and_empty_ones():
    episodes = 3 * SKETCH
    common, rest = steps(int(0.3 * episodes), 0, 1), steps(int(0.7 * episodes), 1, 1)
    fresh = steps(int(0.7 * episodes), 2, 1)
    one, other = load_dataset(joined(common, rest)), load_dataset(joined(common, fresh))
    sketch = sketch_of(one.episode_digests())
    np.testing.assert_array_equal(sketch, np.sort(one.episode_digests())[:SKETCH])
    assert shared_share(sketch, other.episode_digests()) == pytest.approx(0.3, abs=0.05)
    assert share(one, load_dataset(fresh)) == 0
    assert share(one, one) == 1
    few, lowest = np.array([5, 7], np.int64), np.arange(SKETCH, dtype=np.int64) - 2**62
    for sketched, digests in ((few[:0], few), (few, few[:0]), (lowest, few)):
        assert shared_share(sketched, digests) == 0
