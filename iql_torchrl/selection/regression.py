"""Inputs of fitted Q evaluation: rows of a log, choices of the policies, stacked critics."""

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
from iql_torchrl.data.schema import leaf_spaces
from iql_torchrl.data.spaces import is_image, usual_encoder
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import Standardise
from iql_torchrl.networks.evaluation import chain
from iql_torchrl.selection.candidates import Member, actions, log_probabilities
from iql_torchrl.selection.episodes import returns_to_go, states

__all__ = [
    "Choices",
    "Layers",
    "Regression",
    "Steps",
    "chooser",
    "features_of",
    "forward",
    "hidden_features",
    "stacked_critics",
]

Layers = list[tuple[Tensor, Tensor]]
Choose = Callable[[Member, TensorDictBase], Tensor]


class Regression:
    """Data of the log ``train`` for the critics of P ``members`` and of the log's own policy.

    There are P + 1 critics. The last one is of the policy that made the log. It estimates the value
    of a state from the logged steps, so it does not depend on an action: its action input is always
    the log's mean action, or it averages over the outputs of discrete actions.

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
        # If all returns are equal, their deviation is 0 and cannot be the unit.
        self.unit = float(returns.std()) or max(float(np.abs(returns).mean()), 1.0)
        self.centre = float(returns.mean()) / self.unit
        self.features = partial(features_of, train)
        self.inputs = self.features(train.transitions[:1]).shape[-1]
        self.outputs = 1
        if isinstance(train.action_space, spaces.Discrete):
            self.outputs = int(train.action_space.n)
        else:
            logged = train.transitions["action"].float()
            self.scale = Standardise(logged.mean(0), logged.std(0, unbiased=False)).to(device)
            self.inputs += logged.shape[-1]

    def choices(self, table: TensorDictBase) -> Tensor:
        """Of every member, then of the log's policy: ``(P + 1, N, n)`` or ``(P + 1, N, K, A)``."""
        chosen = torch.stack([self.choose(m, table) for m in self.members]).to(self.device)
        if self.discrete:
            own = torch.full_like(chosen[:1], 1 / self.outputs)
        else:
            own = self.scale.mean.float().expand_as(chosen[:1])
        return torch.cat([chosen, own])

    def expected(self, layers: Layers, features: Tensor, choices: Tensor) -> Tensor:
        """``E_{a~pi} Q(s, a)``: ``(P + 1, B)`` from the choices at B states."""
        if self.discrete:
            return (choices * forward(layers, features)).sum(-1)
        samples = choices.shape[2]
        inputs = self.pairs(features.repeat_interleave(samples, 0), choices.flatten(1, 2))
        return forward(layers, inputs).unflatten(1, (-1, samples)).mean((2, 3))

    def taken(self, layers: Layers, features: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of logged actions, and V(s) of the log's own policy, ``(P + 1, B)``."""
        if self.discrete:
            every = forward(layers, features)
            values = F.pick_action(every, action, leading=1)
            return torch.cat([values[:-1], every[-1:].mean(-1)])
        return forward(layers, self.pairs(features, self.actions_read(action))).squeeze(-1)

    def actions_read(self, action: Tensor) -> Tensor:
        """Logged continuous actions ``(B, A)`` as each critic reads them, ``(P + 1, B, A)``."""
        every = action.expand(len(self.members) + 1, -1, -1).clone()
        every[-1] = self.scale.mean
        return every

    def pairs(self, features: Tensor, action: Tensor) -> Tensor:
        """Inputs of critics of continuous actions, ``(P, B, D + A)`` from ``(B, D)``, ``(P, B, A)``."""
        return torch.cat([features.expand(len(action), -1, -1), self.scale(action)], -1)


class Steps:
    """Rows of a log as the regression reads them.

    ``stopped`` ``(N,)``: rows whose following state does not occur in the log. The value of that
    state counts as ``lowest`` for the members and ``highest`` for the log's own policy, in units
    of ``data.unit``.
    """

    def __init__(
        self,
        data: Regression,
        log: OfflineDataset,
        table_bytes: int,
        stopped: Tensor,
        limits: tuple[float, float],
    ) -> None:
        table = log.transitions
        reward = log.reward_map.inverse(table["next", "reward"].reshape(-1).double())
        self.data, self.rows = data, len(table)
        self.features = data.features(table).to(data.device)
        self.following = data.features(table, following=True).to(data.device)
        self.reward = (reward / data.unit).float().to(data.device)
        self.terminated = table["next", "terminated"].reshape(-1).to(data.device)
        self.action = table["action"].to(data.device)
        if not data.discrete:
            self.action = self.action.float()
        self.stopped = stopped.to(data.device)
        ends = torch.full((len(data.members) + 1, 1), limits[0] / data.unit)
        ends[-1] = limits[1] / data.unit
        self.end_values = ends.to(data.device)
        self.choices = Choices(data, states(table, following=True), table_bytes)

    def target(self, layers: Layers, index: Tensor, rows: Tensor | None = None) -> Tensor:
        """``r + discount * E Q'(s', .)``, ``(P + 1, B)``.

        ``index``: row numbers ``(B,)`` on the device. ``rows``: the same on the CPU, where they are
        known there, so that reading them does not wait for the device.
        """
        following = self.data.expected(layers, self.following[index], self.choices(index, rows))
        following = torch.where(self.stopped[index], self.end_values, following)
        terminated = self.terminated[index].expand_as(following)
        return F.td_target(self.reward[index], following, terminated, gamma=self.data.discount)

    def value(self, layers: Layers, index: Tensor) -> Tensor:
        return self.data.taken(layers, self.features[index], self.action[index])


class Choices:
    """Every policy's choices at a table of states: stored if memory allows, else computed again."""

    def __init__(self, data: Regression, table: TensorDictBase, table_bytes: int) -> None:
        self.data, self.states = data, table
        self.kept: Tensor | None = None
        one = data.choices(table[:1])
        if one.numel() * one.element_size() * len(table) <= table_bytes:
            self.kept = data.choices(table)

    def __call__(self, index: Tensor, rows: Tensor | None = None) -> Tensor:
        if self.kept is not None:
            return self.kept.index_select(1, index)
        rows = index if rows is None else rows
        return self.data.choices(self.states[rows.to(self.states.device or "cpu")])


def chooser(log: OfflineDataset, deterministic: bool | None, samples: int, seed: int) -> Choose:
    """``choose(member, states)``: probabilities ``(N, n)``, or actions ``(N, K, A)``."""
    space = log.action_space
    if isinstance(space, spaces.Discrete):
        count, mode = int(space.n), bool(deterministic)

        def choose(member: Member, table: TensorDictBase) -> Tensor:
            return log_probabilities(member, table, count, deterministic=mode).exp().float()

        return choose
    return partial(actions, samples=samples if deterministic is False else 0, seed=seed)


def features_of(train: OfflineDataset, rows: TensorDictBase, *, following: bool = False) -> Tensor:
    """``(N, D)`` standardised by ``train``'s statistics; categories as one-hot vectors."""
    table = rows["next"] if following else rows
    leaves = leaf_spaces(train.observation_space)
    parts = []
    for key in sorted(leaves):
        space = leaves[key]
        if is_image(space):
            raise ValueError(
                f"{'.'.join(key)} is {describe_space(space)}; fitted Q evaluation reads numbers and "
                "categories, no images. Load the data with features of a network of your own instead."
            )
        statistics = train.statistics.get(key[0] if len(key) == 1 else key)
        encoder, _ = usual_encoder(space, statistics)
        parts.append(encoder(table[key]).float())
    return torch.cat(parts, -1)


def stacked_critics(data: Regression, hidden: Sequence[int], seed: int) -> Layers:
    """P + 1 equal MLPs stacked: orthogonal weights ``(P + 1, in, out)``, the log's mean as output."""
    generator = torch.Generator().manual_seed(seed)
    widths, layers = [data.inputs, *hidden, data.outputs], []
    for number, (before, after) in enumerate(pairwise(widths)):
        last = number == len(hidden)
        weight = torch.zeros(before, after)
        if not last:
            nn.init.orthogonal_(weight, 2.0**0.5, generator=generator)
        bias = torch.full((1, after), data.centre if last else 0.0)
        pair = [
            leaf.expand(len(data.members) + 1, -1, -1).contiguous().to(data.device)
            for leaf in (weight, bias)
        ]
        layers.append((pair[0].requires_grad_(), pair[1].requires_grad_()))
    return layers


def forward(layers: Layers, inputs: Tensor) -> Tensor:
    """``(B, D)`` or ``(P, B, D)`` to ``(P, B, outputs)``."""
    return chain(inputs, [leaf for w, b in layers for leaf in (w.mT, b.squeeze(-2))])


def hidden_features(layers: Layers, inputs: Tensor) -> Tensor:
    """Inputs of the last layer: ``(B, D)`` or ``(P, B, D)`` to ``(P, B, width)``."""
    if len(layers) == 1:
        return inputs.expand(len(layers[0][0]), -1, -1)
    return forward(layers[:-1], inputs).relu()
