"""What fitted Q evaluation regresses on: rows of a log, members' choices, stacked critics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import Tensor, nn

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.data.transitions import leaf_spaces
from iql_torchrl.members import Member, actions, log_probabilities, returns_to_go, states
from iql_torchrl.networks import Standardise

__all__ = ["Choices", "Layers", "Regression", "Steps", "chooser", "features_of", "stacked_critics"]

Layers = list[tuple[Tensor, Tensor]]
Choose = Callable[[Member, TensorDictBase], Tensor]


class Regression:
    """What critics of ``members`` need of the log ``train`` beside its rows.

    Values are in units of the deviation of the log's returns, ``unit``; ``centre`` is their mean.
    """

    def __init__(
        self,
        train: OfflineDataset,
        members: tuple[Member, ...],
        device: torch.device,
        discount: float,
        choose: Choose,
    ) -> None:
        self.members, self.device, self.discount = members, device, discount
        self.choose = choose
        self.discrete = isinstance(train.action_space, spaces.Discrete)
        returns = returns_to_go(train, discount)
        # A log of one return only has no deviation to measure by.
        self.unit = float(returns.std()) or max(float(np.abs(returns).mean()), 1.0)
        self.centre = float(returns.mean()) / self.unit
        self.features = partial(features_of, train, one_hot=not self.discrete)
        first = self.features(train.transitions[:1])
        space = train.observation_space
        self.categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
        self.inputs = first.shape[-1] if first.is_floating_point() else self.categories
        self.outputs = 1
        if isinstance(train.action_space, spaces.Discrete):
            self.outputs = int(train.action_space.n)
        else:
            logged = train.transitions["action"].float()
            self.scale = Standardise(logged.mean(0), logged.std(0, unbiased=False)).to(device)
            self.inputs += logged.shape[-1]

    def expected(self, layers: Layers, features: Tensor, choices: Tensor) -> Tensor:
        """``E_{a~pi}Q(s, a)``: ``(P, B)`` from ``(P, B, n)`` probabilities or ``(P, B, K, A)``."""
        if self.discrete:
            return (choices * _forward(layers, features)).sum(-1)
        samples = choices.shape[2]
        repeated = features.repeat_interleave(samples, 0).expand(len(choices), -1, -1)
        inputs = torch.cat([repeated, self.scale(choices.flatten(1, 2))], -1)
        return _forward(layers, inputs).unflatten(1, (-1, samples)).mean((2, 3))

    def taken(self, layers: Layers, features: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of logged actions, ``(P, B)``."""
        if self.discrete:
            return F.pick_action(_forward(layers, features), action, leading=1)
        return _forward(layers, torch.cat([features, self.scale(action)], -1)).squeeze(-1)


class Steps:
    """Rows of a log as the regression reads them, all of them or those numbered ``rows``."""

    def __init__(
        self, data: Regression, log: OfflineDataset, rows: Tensor | None, table_bytes: int
    ) -> None:
        table = log.transitions if rows is None else log.transitions[rows]
        reward = log.reward_map.inverse(table["next", "reward"].reshape(-1).double())
        self.data, self.rows = data, len(table)
        self.features = data.features(table).to(data.device)
        self.following = data.features(table, following=True).to(data.device)
        self.reward = (reward / data.unit).float().to(data.device)
        self.terminated = table["next", "terminated"].reshape(-1).to(data.device)
        self.action = table["action"].to(data.device)
        if not data.discrete:
            self.action = self.action.float()
        self.choices = Choices(data, states(table, following=True), table_bytes)

    def target(self, layers: Layers, index: Tensor) -> Tensor:
        """``r + discount * E Q'(s', .)``, ``(P, B)``."""
        following = self.data.expected(layers, self.following[index], self.choices(index))
        terminated = self.terminated[index].expand_as(following)
        return F.td_target(self.reward[index], following, terminated, gamma=self.data.discount)

    def value(self, layers: Layers, index: Tensor) -> Tensor:
        return self.data.taken(layers, self.features[index], self.action[index])


class Choices:
    """Every member's choices at a table of states: kept where they fit, else asked for anew."""

    def __init__(self, data: Regression, table: TensorDictBase, table_bytes: int) -> None:
        self.data, self.states = data, table
        self.kept: Tensor | None = None
        one = data.choose(data.members[0], table[:1])
        if one.numel() * one.element_size() * len(table) * len(data.members) <= table_bytes:
            self.kept = self._ask(table)

    def __call__(self, index: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept.index_select(1, index)
        return self._ask(self.states[index.to(self.states.device or "cpu")])

    def _ask(self, table: TensorDictBase) -> Tensor:
        choose, members = self.data.choose, self.data.members
        return torch.stack([choose(m, table) for m in members]).to(self.data.device)


def chooser(log: OfflineDataset, deterministic: bool | None, samples: int, seed: int) -> Choose:
    """``choose(member, states)``: probabilities ``(N, n)``, or actions ``(N, K, A)``."""
    space = log.action_space
    if isinstance(space, spaces.Discrete):
        count, mode = int(space.n), bool(deterministic)

        def choose(member: Member, table: TensorDictBase) -> Tensor:
            return log_probabilities(member, table, count, deterministic=mode).exp().float()

        return choose
    return partial(actions, samples=samples if deterministic is False else 0, seed=seed)


def features_of(
    train: OfflineDataset, rows: TensorDictBase, *, following: bool = False, one_hot: bool = False
) -> Tensor:
    """``(N, D)`` standardised by ``train``'s statistics; a lone category stays ``(N,)`` int64."""
    table = rows["next"] if following else rows
    leaves = leaf_spaces(train.observation_space)
    if isinstance(train.observation_space, spaces.Discrete) and not one_hot:
        category: Tensor = table["observation"]
        return category
    parts = []
    for key in sorted(leaves):
        values, space = table[key], leaves[key]
        name = key[0] if len(key) == 1 else key
        if isinstance(space, spaces.Discrete):
            parts.append(nn.functional.one_hot(values, int(space.n)).float())
        elif name in train.statistics and values.ndim == 2:
            statistics = train.statistics[name]
            parts.append(Standardise(statistics.mean, statistics.std)(values.float()).float())
        else:
            raise ValueError(
                f"{'.'.join(key)} is {space}; fitted Q evaluation wants vectors of numbers and "
                "categories. Load the data with features of a network of your own instead."
            )
    return torch.cat(parts, -1)


def stacked_critics(data: Regression, hidden: Sequence[int], seed: int) -> Layers:
    """P equal MLPs stacked: ``(P, in, out)`` orthogonal weights; the last layer says the log's mean."""
    generator = torch.Generator().manual_seed(seed)
    widths, layers = [data.inputs, *hidden, data.outputs], []
    for number, (before, after) in enumerate(pairwise(widths)):
        last = number == len(hidden)
        weight = torch.zeros(before, after)
        if not last:
            nn.init.orthogonal_(weight, 2.0**0.5, generator=generator)
        bias = torch.full((1, after), data.centre if last else 0.0)
        pair = [
            leaf.expand(len(data.members), -1, -1).contiguous().to(data.device)
            for leaf in (weight, bias)
        ]
        layers.append((pair[0].requires_grad_(), pair[1].requires_grad_()))
    return layers


def _forward(layers: Layers, inputs: Tensor) -> Tensor:
    """``(B,)`` categories, ``(B, D)`` or ``(P, B, D)`` -> ``(P, B, outputs)``."""
    x = inputs
    for number, (weight, bias) in enumerate(layers):
        if number:
            x = x.relu()
        if x.is_floating_point():
            x = torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)
        else:  # the product with a one-hot row is that row of the weights
            x = weight.index_select(1, x) + bias
    return x
