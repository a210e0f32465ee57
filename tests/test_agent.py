"""make_agent: parts that fit the data, on one device, from one seed."""

from __future__ import annotations

import copy
import pickle

import gymnasium
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from iql_torchrl import DiscreteIQLLoss, IQLConfig, IQLLoss, evaluate, load_dataset, make_agent


def arrays(rows: int = 60, actions=None):
    generator = np.random.default_rng(0)
    ends = np.arange(rows) % 10 == 9
    return {
        "observation": generator.normal(size=(rows, 3)).astype(np.float32) * [1, 10, 100] + 5,
        "action": generator.uniform(-1, 1, (rows, 2)).astype(np.float32)
        if actions is None
        else actions,
        "reward": generator.normal(size=rows).astype(np.float32),
        "next_observation": generator.normal(size=(rows, 3)).astype(np.float32),
        "terminated": np.zeros(rows, bool),
        "truncated": ends,
    }


def config(**options) -> IQLConfig:
    return IQLConfig(updates=10, hidden=(8,), batch_size=16, reward="raw", **options)


def dataset(**options):
    data = arrays(**options)
    data["observation"] = data["observation"].astype(np.float32)
    return load_dataset(data, reward="raw")


@pytest.mark.parametrize("policy", ["auto", "gaussian", "tanh_normal", "deterministic", "mixture"])
def test_every_policy_trains(policy):
    data = dataset()
    agent = make_agent(config(policy=policy), data)
    assert isinstance(agent.loss, IQLLoss)
    buffer = data.replay_buffer(16, seed=0)
    for _ in range(3):
        metrics = agent.step(buffer.sample())
    assert metrics["loss_actor"].isfinite()


def test_discrete_actions_and_categorical_observations():
    data = arrays(actions=np.arange(60) % 4)
    data["observation"] = (np.arange(60) % 5).astype(np.int64)
    data["next_observation"] = (np.arange(1, 61) % 5).astype(np.int64)
    data = load_dataset(data)
    agent = make_agent(config(), data)
    assert isinstance(agent.loss, DiscreteIQLLoss)
    agent.step(data.replay_buffer(16, seed=0).sample())

    class FiveStates(gymnasium.Env):
        observation_space = gymnasium.spaces.Discrete(5)
        action_space = gymnasium.spaces.Discrete(4)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = 2 + (seed or 0) % 3
            return 1, {}

        def step(self, action):
            self.left -= 1
            return 2, 1.0, self.left == 0, False, {}

    result = evaluate(agent.policy, FiveStates, episodes=3, num_envs=2, seed=0)
    assert result.returns.tolist() == [2.0, 3.0, 4.0]
    assert evaluate(agent.policy, FiveStates, episodes=1, seed=0).returns.tolist() == [2.0]


def test_standardisation_is_the_first_layer_of_every_network():
    data = dataset()
    agent = make_agent(config(), data)
    mean = data.statistics["observation"].mean
    buffers = dict(agent.loss.named_buffers())
    stored = [b for n, b in buffers.items() if n.endswith("preprocess.mean")]
    assert stored
    assert all(torch.equal(b, mean.expand_as(b)) for b in stored)
    plain = make_agent(config(standardise=False), data)
    assert not [n for n, _ in plain.loss.named_buffers() if "preprocess" in n]


def test_the_seed_decides_and_the_callers_random_state_is_left_alone():
    data = dataset()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = make_agent(config(seed=1), data), make_agent(config(seed=1), data)
    other = make_agent(config(seed=2), data)
    assert torch.equal(torch.get_rng_state(), state)
    key = "actor_network_params.module.0.module.mlp.0.weight"
    a, b, c = (agent.loss.state_dict()[key] for agent in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.gpu
def test_policy_and_loss_live_on_the_configured_device():
    data = dataset()
    agent = make_agent(config(device="cuda"), data)
    held = [*agent.policy.parameters(), *agent.policy.buffers(), *agent.loss.parameters()]
    assert {tensor.device.type for tensor in held} == {"cuda"}
    agent.step(data.replay_buffer(16, device="cuda", seed=0).sample())


def test_the_policys_buffers_are_the_losss():
    agent = make_agent(config(), dataset())
    held = {b.data_ptr() for b in agent.policy.buffers()}
    assert held <= {leaf.data_ptr() for leaf in agent.loss.actor_network_params.values(True, True)}


def test_learning_rates_and_schedule():
    rates = {"actor_lr": 1e-3, "critic_lr": 2e-3, "value_lr": 3e-3}
    agent = make_agent(config(**rates), dataset())
    assert [group["lr"] for group in agent.optimizer.param_groups] == [1e-3, 2e-3, 3e-3]
    buffer = dataset().replay_buffer(16, seed=0)
    for _ in range(5):
        agent.step(buffer.sample())
    after = [group["lr"] for group in agent.optimizer.param_groups]
    np.testing.assert_allclose(after, [0.5e-3, 2e-3, 3e-3])
    assert isinstance(agent.scheduler, LRScheduler)
    pickle.dumps(agent.scheduler.state_dict())


def test_an_agent_cannot_be_copied_in_silence():
    with pytest.raises(TypeError, match="train nothing"):
        copy.deepcopy(make_agent(config(), dataset()))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="policy is 'categorical'"):
        make_agent(config(policy="categorical"), dataset())
    discrete = dataset(actions=np.arange(60) % 4)
    with pytest.raises(ValueError, match="policy is 'gaussian'"):
        make_agent(config(policy="gaussian"), discrete)
