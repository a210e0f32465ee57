"""Undiscounted values: right where every episode terminates, and a warning elsewhere."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import config

from iql_torchrl import IQLPopulation, fitted_q_evaluation, load_dataset, make_agent
from iql_torchrl.data import DatasetWarning

# the sum of the rewards from each of three states on, each of which pays 1 and leads to the next
EXACT = {1.0: [3, 2, 1], 0.5: [1.75, 1.5, 1]}
FAST = dict.fromkeys(("actor_lr", "critic_lr", "value_lr"), 1e-2)


def chain(truncated: bool = False, episodes: int = 80):
    """Episodes from a random state; with ``truncated`` one of them is cut after one step."""
    draw = np.random.default_rng(0)
    state = np.concatenate([np.arange(first, 3) for first in draw.integers(0, 3, episodes)])
    cut = np.zeros(len(state), bool)
    if truncated:
        state, cut = np.append(state, 0), np.append(cut, True)
    return load_dataset(
        {
            "observation": state,
            "action": draw.integers(0, 2, len(state)),
            "reward": np.ones(len(state), np.float32),
            "next_observation": np.minimum(state + 1, 2),
            "terminated": state == 2,
            "truncated": cut,
        },
        action_space=spaces.Discrete(2),
    )


def settings(**options):
    return config(
        discount=1.0, expectile=0.5, polyak=0.1, schedule="constant", updates=400, **FAST, **options
    )


def assert_values(agent, discount=1.0):
    states = torch.arange(3)
    value = agent.loss.value_network(states).flatten().detach()
    np.testing.assert_allclose(value, EXACT[discount], atol=0.1)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_values_are_sums_of_rewards(compile):
    data = chain()
    agent, buffer = make_agent(settings(compile=compile), data), data.replay_buffer(64, seed=0)
    for _ in range(400):
        agent.step(buffer.sample())
    assert_values(agent)
    for model in ("table", "network"):
        fitted = fitted_q_evaluation(
            {"a": agent}, *data.split(0.5, 0), discount=1.0, model=model,
            hidden=(8,), updates=400, lr=1e-2, batch_size=64, polyak=0.1,
        )  # fmt: skip
        first = data.split(0.5, 0)[1].episode_returns
        np.testing.assert_allclose(fitted.initial_values[0], first, atol=0.2)


def test_runs_of_a_population_have_each_its_discount():
    configs = [settings(), settings().from_dict(settings().to_dict() | {"discount": 0.5})]
    population = IQLPopulation(configs, chain())
    population.train_now()
    for number, discount in enumerate((1.0, 0.5)):
        assert_values(population.member(number), discount)


def test_truncated_episodes_give_a_warning():
    with pytest.warns(DatasetWarning, match="discount is 1 and .* has truncated episodes"):
        make_agent(settings(), chain(truncated=True))
    with pytest.warns(DatasetWarning, match="discount is 1 and .* has truncated episodes"):
        IQLPopulation([settings()], chain(truncated=True))
    make_agent(config(discount=0.99), chain(truncated=True))
