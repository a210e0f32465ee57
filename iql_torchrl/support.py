"""How far a policy leaves what the log has seen, where no estimate from the log can follow."""

from __future__ import annotations

import math

import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.members import Member, actions, log_probabilities, states
from iql_torchrl.networks import Standardise
from iql_torchrl.regression import features_of

__all__ = ["Support", "clone_distance"]

TYPICAL = 0.95
QUERIES_AT_ONCE = 256


class Support:
    """The logged choices of ``train``, and shares of the steps of ``held_out`` outside them.

    ``share(member)``, in [0, 1], is:

    - for a category as observation and discrete actions: the policy's probability of actions
      that ``train`` holds fewer than ``min_count`` times in that state, mean over the steps;
    - for other observations and discrete actions: its probability of actions that ``clone`` gives
      less than ``min_probability``; NaN without a clone;
    - for continuous actions: the share of steps where its deterministic action is farther from
      the nearest of the actions logged in the ``neighbours`` nearest states than the logged
      action of the step itself is in 95 % of the steps. A policy that acts like the log has 0.05.
      From at most ``queries`` held-out and ``logged`` training steps drawn from ``seed``; states
      and actions standardised.

    ``usual`` is the same share of the logged actions of ``held_out``; for continuous actions it
    is 0.05 by construction.
    """

    def __init__(
        self,
        train: OfflineDataset,
        held_out: OfflineDataset,
        *,
        clone: Member | None = None,
        min_count: int = 5,
        min_probability: float = 0.02,
        neighbours: int = 10,
        queries: int = 1000,
        logged: int = 20_000,
        seed: int = 0,
    ) -> None:
        self.rows = held_out.transitions
        self.clone = clone
        space = train.action_space
        self.discrete = isinstance(space, spaces.Discrete)
        if isinstance(space, spaces.Discrete):
            self.num_actions = int(space.n)
            self.rare = self._rare(train, min_count, min_probability)
            self.usual = math.nan
            if self.rare is not None:
                taken = self.rare.gather(-1, self.rows["action"][:, None])
                self.usual = float(taken.float().mean())
            return
        generator = torch.Generator().manual_seed(seed)
        self.rows = _drawn(held_out.transitions, queries, generator)
        log = _drawn(train.transitions, logged, generator)
        scale = Standardise(*_moments(train.transitions["action"]))
        self.scale = scale
        near = _nearest(
            features_of(train, self.rows, one_hot=True),
            features_of(train, log, one_hot=True),
            neighbours,
        )
        self.near = scale(log["action"].float())[near]
        own = self._gap(self.rows["action"])
        self.typical = own.quantile(TYPICAL)
        self.usual = float((own > self.typical).float().mean())

    def share(self, member: Member) -> float:
        """The share of extrapolation, or NaN where it cannot be known; see the class."""
        if not self.discrete:
            chosen = actions(member, states(self.rows)).squeeze(1)
            return float((self._gap(chosen) > self.typical).float().mean())
        if self.rare is None:
            return math.nan
        probability = log_probabilities(member, states(self.rows), self.num_actions).exp()
        return float((probability * self.rare).sum(-1).mean())

    def _rare(self, train: OfflineDataset, min_count: int, min_probability: float) -> Tensor | None:
        if isinstance(train.observation_space, spaces.Discrete):
            log = train.transitions
            pair = log["observation"] * self.num_actions + log["action"]
            size = int(train.observation_space.n) * self.num_actions
            count = torch.bincount(pair, minlength=size).view(-1, self.num_actions)
            return (count < min_count)[self.rows["observation"]]
        if self.clone is None:
            return None
        probability = log_probabilities(self.clone, states(self.rows), self.num_actions).exp()
        return probability < min_probability

    def _gap(self, action: Tensor) -> Tensor:
        return (self.near - self.scale(action.float())[:, None]).norm(dim=-1).amin(-1)


def clone_distance(member: Member, clone: Member, log: OfflineDataset) -> float:
    """How far ``member`` is from ``clone`` at the log's states; 0 for the clone itself.

    Discrete actions: mean ``KL(pi || clone)`` in nats, infinite where the clone excludes what the
    policy does. Continuous: mean squared Euclidean distance of the deterministic actions.
    """
    table = states(log.transitions)
    if not isinstance(log.action_space, spaces.Discrete):
        gap = actions(member, table) - actions(clone, table)
        return float(gap.double().square().sum(-1).mean())
    count = int(log.action_space.n)
    own, other = (log_probabilities(each, table, count) for each in (member, clone))
    possible = own > -torch.inf
    terms = torch.where(possible, own.exp() * (own - other), torch.zeros_like(own))
    return float(terms.sum(-1).mean().clamp(min=0.0))


def _drawn(rows: TensorDictBase, count: int, generator: torch.Generator) -> TensorDictBase:
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].sort().values]


def _moments(action: Tensor) -> tuple[Tensor, Tensor]:
    action = action.float()
    return action.mean(0), action.std(0, unbiased=False)


def _nearest(queries: Tensor, logged: Tensor, neighbours: int) -> Tensor:
    """Rows of ``logged`` nearest to each of ``queries`` ``(Q, D)``: ``(Q, neighbours)``."""
    count = min(neighbours, len(logged))
    parts = [
        torch.cdist(part, logged).topk(count, largest=False).indices
        for part in queries.split(QUERIES_AT_ONCE)
    ]
    return torch.cat(parts)
