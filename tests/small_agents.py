"""Small logs, agents for them, and their networks' outputs computed in NumPy."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from iql_torchrl import IQLConfig, load_dataset, make_agent
from iql_torchrl.files import write_components

MEAN, SCALE = np.array([5.0, -3.0, 0.5]), np.array([1.0, 10.0, 100.0])
LOW, HIGH = np.array([-2.0, 0.0]), np.array([1.0, 0.25])


def following(observation, ends):
    """What follows each row: the next row inside an episode, another state after its end."""
    index = np.arange(1, len(ends) + 1) % len(ends)
    index[ends] = np.flatnonzero(ends) - 2
    if isinstance(observation, dict):
        return {key: values[index] for key, values in observation.items()}
    return observation[index]


def small_columns(rows: int = 40, observation=None, action=None, **more):
    generator = np.random.default_rng(0)
    if observation is None:
        observation = (generator.normal(size=(rows, 3)) * SCALE + MEAN).astype(np.float32)
    if action is None:
        action = generator.uniform(-1, 1, (rows, 2)).astype(np.float32)
    ends = np.arange(rows) % 10 == 9
    return {
        "observation": observation,
        "action": action,
        "reward": generator.normal(size=rows).astype(np.float32),
        "next_observation": following(observation, ends),
        "terminated": np.zeros(rows, bool),
        "truncated": ends,
        **more,
    }


class Walk(gymnasium.Env):
    """A few steps of any spaces; observations are ``observe(step)``, rewards ``pay(step, action)``."""

    def __init__(self, observation_space, action_space, observe, pay, steps=4):
        self.observation_space, self.action_space = observation_space, action_space
        self.observe, self.pay, self.steps = observe, pay, steps

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = 0
        return self.observe(0), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = self.pay(self.number, action)
        self.number += 1
        return self.observe(self.number), reward, False, self.number == self.steps, {}


def config(**options) -> IQLConfig:
    return IQLConfig(
        **{"updates": 10, "hidden": (8,), "batch_size": 16, "reward": "raw", **options}
    )


def observations(rows: int = 9):
    return (np.random.default_rng(1).normal(size=(rows, 3)) * SCALE + MEAN).astype(np.float32)


def box_agent(dtype=np.float32, weights=torch.float32, **options):
    space = spaces.Box(LOW.astype(dtype), HIGH.astype(dtype), dtype=dtype)
    dataset = replace(load_dataset(small_columns(), dtype=weights), action_space=space)
    return make_agent(config(**options), dataset)


def trained(weights=torch.float32, **options):
    """A :func:`box_agent` after three updates."""
    agent = box_agent(weights=weights, **options)
    buffer = load_dataset(small_columns(), dtype=weights).replay_buffer(16, seed=0)
    for _ in range(3):
        agent.step(buffer.sample())
    return agent


def saved(agent, path, description=None):
    """``path``, to which the agent is written as a checkpoint, described otherwise if given."""
    description = description or agent.description()
    return write_components(path, {"agent": description, "loss_module": agent.state_dict()})


def same_weights(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def discrete_agent(start: int = 0, masked: bool = False, **options):
    more = {}
    if masked:
        more = {"action_mask": np.ones((40, 4), bool), "next_action_mask": np.ones((40, 4), bool)}
    dataset = load_dataset(small_columns(action=np.arange(40) % 4, **more))
    return make_agent(
        config(**options), replace(dataset, action_space=spaces.Discrete(4, start=start))
    )


def by_hand(agent, observation):
    """The network of one hidden layer in NumPy: outputs before any distribution."""
    state = {k: v.double().numpy() for k, v in agent.actor.state_dict().items()}
    layers = {k.partition("mlp.")[2]: v for k, v in state.items() if "mlp." in k}
    statistics = agent.task.statistics["observation"]
    x = (observation - statistics.mean.double().numpy()) / statistics.std.double().numpy()
    x = np.maximum(x @ layers["0.weight"].T + layers["0.bias"], 0)
    return x @ layers["2.weight"].T + layers["2.bias"]


def masks(rows: int = 9):
    allowed = np.random.default_rng(2).random((rows, 4)) < 0.5
    allowed[np.arange(rows), np.arange(rows) % 4] = True
    return allowed
