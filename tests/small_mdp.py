"""A random tabular MDP in NumPy: exact values, logs of it, and its policies as TorchRL actors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import ProbabilisticActor

from iql_torchrl import load_dataset

STATES, ACTIONS, DISCOUNT = 5, 3, 0.9


def drawn(draw, probabilities: np.ndarray) -> np.ndarray:
    """One category of each row of ``(N, n)``."""
    below = probabilities.cumsum(1)[:, :-1] <= draw.random((len(probabilities), 1))
    return below.sum(1)


@dataclass
class MDP:
    """``transition`` ``(S, A, S)``, ``reward`` ``(S, A)``, ``ending`` ``(S, A)``: the probability
    that a step terminates, whatever state follows; ``start`` ``(S,)``."""

    transition: np.ndarray
    reward: np.ndarray
    ending: np.ndarray
    start: np.ndarray

    def values(self, policy: np.ndarray) -> np.ndarray:
        """Exact V ``(S,)`` by a linear solve."""
        going = (policy * (1 - self.ending))[:, :, None] * self.transition
        reward = (policy * self.reward).sum(1)
        return np.linalg.solve(np.eye(len(reward)) - DISCOUNT * going.sum(1), reward)

    def dataset(self, policy, episodes=600, horizon=1000, seed=0, masks=None, **options):
        """Episodes of ``policy``, truncated after ``horizon`` steps."""
        draw = np.random.default_rng(seed)
        names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
        episode, rows, numbers = np.arange(episodes), [], []
        state = drawn(draw, np.broadcast_to(self.start, (episodes, len(self.start))))
        for step in range(horizon):  # of all episodes at once
            action = drawn(draw, policy[state])
            following = drawn(draw, self.transition[state, action])
            ended = draw.random(len(state)) < self.ending[state, action]
            cut = ~ended & (step == horizon - 1)
            rows.append((state, action, self.reward[state, action], following, ended, cut))
            numbers.append(episode)
            episode, state = episode[~ended], following[~ended]
            if not len(episode):
                break
        order = np.argsort(np.concatenate(numbers), kind="stable")
        columns = map(np.concatenate, zip(*rows, strict=True))
        table = {n: values[order] for n, values in zip(names, columns, strict=True)}
        table["reward"] = table["reward"].astype(np.float32)
        state, action = table["observation"], table["action"]
        table["action_log_prob"] = np.log(policy[state, action]).astype(np.float32)
        if masks is not None:
            table["action_mask"] = masks[state]
            table["next_action_mask"] = masks[table["next_observation"]]
        return load_dataset(table, **options)


def random_mdp(seed: int = 0) -> MDP:
    draw = np.random.default_rng(seed)
    transition = draw.dirichlet(np.full(STATES, 0.5), (STATES, ACTIONS))
    reward = draw.normal(size=(STATES, ACTIONS)).round(2)
    return MDP(transition, reward, np.full((STATES, ACTIONS), 0.15), np.full(STATES, 1 / STATES))


def random_policies(count: int, seed: int = 1) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).dirichlet(np.full(ACTIONS, 0.7), (count, STATES)))


class Lookup(nn.Module):
    def __init__(self, logits: np.ndarray):
        super().__init__()
        self.register_buffer("logits", torch.as_tensor(logits))

    def forward(self, observation):
        return self.logits[observation]


def actor(policy: np.ndarray) -> ProbabilisticActor:
    """The policy ``(S, A)``; it reads no mask."""
    with np.errstate(divide="ignore"):
        net = Lookup(np.log(policy))
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    return of_logits(module, Categorical(policy.shape[1]))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, observation):
        return self.function(observation)


def policy_of(function, spec=None):
    """A policy whose action is ``function`` of the observation; of a ``spec``, the logits of one."""
    key = "action" if spec is None else "logits"
    module = TensorDictModule(Apply(function), in_keys=["observation"], out_keys=[key])
    return module if spec is None else of_logits(module, spec)


def of_logits(module, spec) -> ProbabilisticActor:
    return ProbabilisticActor(
        module,
        in_keys=["logits"],
        spec=spec,
        distribution_class=torch.distributions.Categorical,
        distribution_kwargs={"validate_args": False},
    )


def candidates(policies):
    return {f"p{number}": actor(policy) for number, policy in enumerate(policies)}


def uniform() -> np.ndarray:
    return np.full((STATES, ACTIONS), 1 / ACTIONS)


def first_states(dataset) -> np.ndarray:
    return dataset.transitions["observation"].numpy()[
        np.r_[0, np.cumsum(dataset.episode_lengths)[:-1]]
    ]


def counted_value(dataset, policy) -> np.ndarray:
    """V ``(S,)`` by a linear solve of the MDP whose dynamics are the dataset's frequencies."""
    rows = dataset.transitions
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    following = rows["next", "observation"].numpy()
    going = ~rows["next", "terminated"].squeeze(-1).numpy()
    chain = np.zeros((STATES, ACTIONS, STATES))
    reward, count = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS))
    np.add.at(count, (state, action), 1)
    np.add.at(chain, (state, action, following), going)
    np.add.at(reward, (state, action), rows["next", "reward"].squeeze(-1).numpy())
    each = np.maximum(count, 1)
    matrix = (policy[:, :, None] * chain / each[:, :, None]).sum(1)
    return np.linalg.solve(np.eye(STATES) - DISCOUNT * matrix, (policy * reward / each).sum(1))


def plain_returns(dataset, discount=DISCOUNT) -> np.ndarray:
    """Discounted sum of each episode's logged rewards, in a loop."""
    reward, row, returns = (
        dataset.transitions["next", "reward"].squeeze(-1).double().tolist(),
        0,
        [],
    )
    for length in dataset.episode_lengths.tolist():
        returns.append(sum(discount**t * reward[row + t] for t in range(length)))
        row += length
    return np.array(returns)


def greedy_policy(mdp: MDP) -> np.ndarray:
    """The policy that is best at each state for the uniform policy's values."""
    ahead = mdp.reward + DISCOUNT * (1 - mdp.ending) * (mdp.transition @ mdp.values(uniform()))
    return np.eye(ACTIONS)[ahead.argmax(1)] * 0.94 + 0.02


def steps_log(rows: int, options=None, **columns):
    """``rows`` steps of one state and one action that end their episodes, but for ``columns``."""
    usual = {"observation": 0, "action": 0, "reward": 0, "next_observation": 0}
    table = {
        name: np.array(np.broadcast_to(values, (rows, *np.shape(values)[1:])))
        for name, values in (usual | {"terminated": True, "truncated": False} | columns).items()
    }
    table["reward"] = table["reward"].astype(np.float32)
    return load_dataset(table, **options or {})
