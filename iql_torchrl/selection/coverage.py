"""Whether policies visit states or take actions that are far from a log of vectors."""

from __future__ import annotations

import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.networks import Standardise
from iql_torchrl.selection.candidates import Member, actions, log_probabilities
from iql_torchrl.selection.episodes import states
from iql_torchrl.selection.regression import features_of

__all__ = ["Coverage", "clone_distance"]

USUAL = 0.99
QUERIES_AT_ONCE = 256


class Coverage:
    """Which states and actions are farther from the log ``train`` than logged ones usually are.

    A conformal test (Bates, Candès, Lei, Romano, Sesia 2023, "Testing for outliers with conformal
    p-values", arXiv:2104.08279): a score measures how far a step lies from ``train``, and a step is
    unsupported when its score exceeds that of 99 % of the steps of ``held_out``. So 1 % of the steps
    of the log's own policy are unsupported. Scores, with states and actions standardised:

    - of a state: distance to the nearest logged state;
    - of a continuous action in a state: distance to the nearest of the actions logged in the
      ``neighbours`` nearest states;
    - of a discrete action in a state: distance to the ``min_count``-th nearest logged state in
      which that action was taken.

    Args:
        train, held_out: two parts of one log.
        queries, logged: the largest numbers of rows of ``held_out`` and of ``train`` that are
            compared, drawn from ``seed``.
    """

    def __init__(
        self,
        train: OfflineDataset,
        held_out: OfflineDataset,
        *,
        min_count: int = 2,
        neighbours: int = 10,
        queries: int = 2_000,
        logged: int = 20_000,
        seed: int = 0,
    ) -> None:
        self.train, self.min_count, self.neighbours = train, max(min_count, 1), neighbours
        generator = torch.Generator().manual_seed(seed)
        log = _drawn(train.transitions, logged, generator)
        calibration = _drawn(held_out.transitions, queries, generator)
        self.features = features_of(train, log)
        self.action = log["action"]
        self.num_actions = 0
        if isinstance(train.action_space, spaces.Discrete):
            self.num_actions = int(train.action_space.n)
        else:
            action = train.transitions["action"].float()
            self.scale = Standardise(action.mean(0), action.std(0, unbiased=False))
        own = features_of(train, calibration)
        self.state_limit = _quantile(self._state_scores(own))
        self.action_limit = _quantile(self._action_scores(own, calibration["action"]))

    def unsupported_states(self, rows: TensorDictBase, *, following: bool = False) -> Tensor:
        """Whether the states of ``rows`` ``(N,)`` lie outside the log, bool ``(N,)``."""
        scores = self._state_scores(features_of(self.train, rows, following=following))
        return scores > self.state_limit

    def unsupported_choices(
        self, rows: TensorDictBase, choices: Tensor, *, following: bool = False
    ) -> Tensor:
        """Each policy's probability of an unsupported action in the states of ``rows``, ``(P, N)``.

        ``choices``: probabilities ``(P, N, n)`` or actions ``(P, N, K, A)``.
        """
        features = features_of(self.train, rows, following=following)
        if self.num_actions:
            rare = (self._distances_by_action(features) > self.action_limit).float()
            return (choices * rare).sum(-1)
        nearest = self._nearest_actions(features)
        gaps = [_gap(nearest, self.scale(choice.float())) for choice in choices]
        return (torch.stack(gaps) > self.action_limit).float().mean(-1)

    def _state_scores(self, features: Tensor) -> Tensor:
        parts = [
            torch.cdist(part, self.features).amin(-1) for part in features.split(QUERIES_AT_ONCE)
        ]
        return torch.cat(parts)

    def _action_scores(self, features: Tensor, action: Tensor) -> Tensor:
        if self.num_actions:
            return self._distances_by_action(features).gather(1, action.reshape(-1, 1)).squeeze(1)
        return _gap(self._nearest_actions(features), self.scale(action.float())[:, None]).squeeze(1)

    def _distances_by_action(self, features: Tensor) -> Tensor:
        """Score of every discrete action, ``(N, n)``; infinite for fewer than ``min_count`` rows."""
        result = torch.full((len(features), self.num_actions), torch.inf)
        for action in range(self.num_actions):
            taken = self.features[self.action.reshape(-1) == action]
            if len(taken) < self.min_count:
                continue
            parts = features.split(QUERIES_AT_ONCE)
            nearest = [torch.cdist(part, taken).kthvalue(self.min_count).values for part in parts]
            result[:, action] = torch.cat(nearest)
        return result

    def _nearest_actions(self, features: Tensor) -> Tensor:
        """Standardised actions logged in the nearest states, ``(N, neighbours, A)``."""
        count = min(self.neighbours, len(self.features))
        parts = [
            torch.cdist(part, self.features).topk(count, largest=False).indices
            for part in features.split(QUERIES_AT_ONCE)
        ]
        return self.scale(self.action.float())[torch.cat(parts)]


def _gap(nearest: Tensor, action: Tensor) -> Tensor:
    """Distance of actions ``(N, K, A)`` to the nearest of ``(N, neighbours, A)``: ``(N, K)``."""
    return torch.cdist(action, nearest).amin(-1)


def _quantile(scores: Tensor) -> Tensor:
    """The 99 % quantile of the scores; the greatest finite one (or 0) where that is infinite."""
    finite = scores[scores.isfinite()].sort().values
    if not len(finite):
        return torch.zeros(())
    return finite[min(int(USUAL * len(scores)), len(finite) - 1)]


def _drawn(rows: TensorDictBase, count: int, generator: torch.Generator) -> TensorDictBase:
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].sort().values]


def clone_distance(member: Member, clone: Member, log: OfflineDataset) -> float:
    """How far ``member`` is from ``clone`` at the log's states; 0 for the clone itself.

    Discrete actions: mean ``KL(pi || clone)`` in nats, infinite where the clone gives probability 0
    to an action of the policy. Continuous: mean squared Euclidean distance of the deterministic
    actions.
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
