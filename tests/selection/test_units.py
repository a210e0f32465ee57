"""Columns of small numbers, such as wavelengths in metres, are as useful as in larger units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import config
from small_mdp import policy_of, steps_log
from torchrl.data import Categorical

from iql_torchrl import fitted_q_evaluation, make_agent

MIDDLE = 550e-9


def bandit(unit: float, rows: int = 2000):
    """Light of 400 to 530 and 570 to 700 nm; arm 1 pays 1 above 550 nm and arm 0 below, else 0."""
    draw = np.random.default_rng(0)

    def light():
        return draw.uniform(400e-9, 530e-9, (rows, 1)) + 170e-9 * draw.integers(0, 2, (rows, 1))

    wavelength = light()
    action = draw.integers(0, 2, rows)
    return steps_log(
        rows, {"action_space": spaces.Discrete(2)}, action=action,
        observation=(wavelength * unit).astype(np.float32),
        reward=action == (wavelength[:, 0] > MIDDLE),
        next_observation=(light() * unit).astype(np.float32),
    )  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore::iql_torchrl.data.DatasetWarning")


@pytest.mark.parametrize("unit", [1.0, 1e9])  # metres, nanometres
def test_the_better_arm_is_found_in_metres_as_in_nanometres(unit):
    data = bandit(unit)
    rates = dict.fromkeys(("actor_lr", "critic_lr", "value_lr"), 1e-2)
    settings = config(
        hidden=(32,), batch_size=256, updates=400, schedule="constant", temperature=10.0, **rates
    )
    agent, buffer = make_agent(settings, data), data.replay_buffer(256, seed=0)
    for _ in range(400):
        agent.step(buffer.sample())
    wavelength = np.linspace(400e-9, 700e-9, 301)[:, None]
    chosen = agent.act((wavelength * unit).astype(np.float32))
    assert (chosen == (wavelength[:, 0] > MIDDLE)).mean() > 0.95


def best_policy(limit: float):
    def above(light):
        return 100 * torch.cat([limit - light, light - limit], -1).sign()

    return policy_of(above, Categorical(2))


@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_fitted_q_evaluation_of_the_best_policy_gives_one(unit):
    train, held_out = bandit(unit).split(0.5, 0)
    result = fitted_q_evaluation(
        {"best": best_policy(MIDDLE * unit)}, train, held_out, discount=0.5, model="network",
        hidden=(32,), lr=1e-2, updates=500, batch_size=256, deterministic=True,
    )  # fmt: skip
    assert abs(result.values[0] - 1) < 0.05


def test_equal_returns_are_priced_in_their_own_unit():
    data = bandit(1.0, 200)
    data.transitions["next", "reward"].fill_(3e-9)
    result = fitted_q_evaluation(
        {"best": best_policy(MIDDLE)}, *data.split(0.5, 0), discount=0.5, model="network",
        hidden=(4,), updates=5, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(result.values, [3e-9], rtol=1e-2)
