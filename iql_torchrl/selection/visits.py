"""How often policies visit the steps of a log, estimated with features of fitted critics."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.coverage import USUAL, Coverage
from iql_torchrl.selection.episodes import (
    FloatArray,
    episode_numbers,
    first_rows,
    last_rows,
    open_ended,
    returns_to_go,
    states,
)
from iql_torchrl.selection.regression import Layers, Regression, Steps, hidden_features
from iql_torchrl.selection.scores import EpisodeScores, effective_episodes

__all__ = ["network_scores"]


ROWS_AT_ONCE = 4096
MAX_FEATURES = 2048
RIDGE = 1e-3
WORST_SHARE = 0.05
VISITS_COMPARED = 5_000


@torch.no_grad()
def network_scores(
    data: Regression,
    layers: Layers,
    train: OfflineDataset,
    held_out: OfflineDataset,
    steps: tuple[Steps, Steps],
    coverage: Coverage,
    limits: tuple[float, float],
) -> EpisodeScores:
    """Doubly robust scores of ``held_out``'s episodes; see ``table.table_scores`` for the formula.

    The weight ``w(s, a)`` of a step is linear in the last hidden features ``f`` of the policy's own
    critic. Its coefficients solve ``mean_e sum_t w (f(s, a) - discount E f(s', .)) = mean_e f(s_0)``
    over ``train``, with a small ridge: minimax weight learning with a linear class (Uehara, Huang,
    Jiang 2020, arXiv:1910.12809, section 4). Negative weights count as 0.

    ``steps``: of ``train`` and ``held_out``; ``limits``: least and greatest return.
    """
    first, last = first_rows(held_out), last_rows(held_out)
    number, episodes = episode_numbers(held_out), len(first)
    starts = held_out.transitions[torch.from_numpy(first)]
    initial = _expected(data, layers, states(starts), data.features(starts))
    fitted, fresh = steps
    weights = VisitWeights(data, layers, train, fitted)
    train_weight, _, _ = _read(data, layers, fitted, weights)
    weight, _, error = _read(data, layers, fresh, weights)
    correction = [np.bincount(number, row, episodes) for row in weight * error]
    scores: FloatArray = initial[:-1] + np.array(correction[:-1])
    left = data.discount**held_out.episode_lengths * open_ended(held_out)
    ends = held_out.transitions[torch.from_numpy(last)]
    after = _expected(
        data, layers, states(ends, following=True), data.features(ends, following=True)
    )[-1]
    low, high = limits
    stopped = fresh.stopped.cpu().numpy()[last]
    after = np.where(stopped, high, after)
    log_high: FloatArray = (
        returns_to_go(held_out, data.discount)[first] + left * after + correction[-1]
    )
    ended = (train_weight * fitted.stopped.cpu().numpy()).sum(1) / len(train.episode_lengths)
    scores_high: FloatArray = scores + data.discount * ended[:-1, None] * (high - low)
    log_scores = log_high - (left * stopped + data.discount * ended[-1]) * (high - low)
    surprise = train_weight.max(1) * (high - low)
    share, worst = _unsupported(data, train, fitted, train_weight, coverage)
    return EpisodeScores(
        scores, log_scores, scores_high, log_high, initial[:-1], surprise[:-1],
        float(surprise[-1]), share[:-1],
        float(share[-1]), worst[:-1], float((left * stopped).mean()), limits,
        np.array([effective_episodes(row, held_out) for row in weight[:-1]]), {},
    )  # fmt: skip


class VisitWeights:
    """Each policy's discounted visits of a step, relative to the log's: linear in features.

    The last policy is the log's own; its weights are those of the visits after truncated ends of
    episodes.
    """

    def __init__(self, data: Regression, layers: Layers, log: OfflineDataset, steps: Steps) -> None:
        self.data, self.layers = data, layers
        self.episodes = len(log.episode_lengths)
        starts = log.transitions[torch.from_numpy(first_rows(log))]
        last = torch.from_numpy(last_rows(log))
        ends = last.to(data.device)
        cut = torch.from_numpy(data.discount**log.episode_lengths * open_ended(log))
        left = cut.float().to(data.device) * ~steps.stopped[ends]
        self.coefficients = []
        chosen = data.choices(states(starts))
        features = data.features(starts).to(data.device)
        for policy in range(len(data.members) + 1):
            if policy < len(data.members):
                begun = self._expected(policy, features, chosen).mean(0)
            else:
                after = self._expected(policy, steps.following[ends], steps.choices(ends, last))
                begun = (left[:, None] * after).mean(0)
            self.coefficients.append(self._solve(policy, steps, begun.double()))

    def __call__(self, steps: Steps, index: Tensor) -> Tensor:
        """Weights of the steps numbered ``index``, ``(P + 1, B)``, at least 0."""
        rows = [
            self._logged(policy, steps, index).double() @ coefficients
            for policy, coefficients in enumerate(self.coefficients)
        ]
        return torch.stack(rows).clamp(min=0)

    def _solve(self, policy: int, steps: Steps, begun: Tensor) -> Tensor:
        size = len(begun)
        change = torch.zeros(size, size, dtype=torch.float64, device=begun.device)
        squares = torch.zeros(size, dtype=torch.float64, device=begun.device)
        for rows in torch.arange(steps.rows).split(ROWS_AT_ONCE):
            index = rows.to(begun.device)
            logged = self._logged(policy, steps, index)
            going = ~(steps.terminated[index] | steps.stopped[index])
            after = self._expected(policy, steps.following[index], steps.choices(index, rows))
            step = logged - self.data.discount * going[:, None] * after
            change += (step.T @ logged).double()
            squares += logged.double().square().sum(0)
        ridge = RIDGE * squares.mean().clamp(min=1e-12)
        change += ridge * torch.eye(size, dtype=torch.float64, device=begun.device)
        return torch.linalg.solve(change, begun * self.episodes)

    def _logged(self, policy: int, steps: Steps, index: Tensor) -> Tensor:
        """Features of logged states and actions, ``(B, F)``."""
        data = self.data
        if data.discrete:
            hidden = self._hidden(policy, steps.features[index])
            if policy == len(data.members):
                return hidden
            taken = torch.nn.functional.one_hot(steps.action[index].reshape(-1), data.outputs)
            return self._crossed(hidden, taken.float())
        pairs = data.pairs(steps.features[index], data.actions_read(steps.action[index]))
        return self._hidden(policy, pairs[policy])

    def _expected(self, policy: int, features: Tensor, choices: Tensor) -> Tensor:
        """Features of states, averaged over the policy's actions there, ``(B, F)``."""
        data = self.data
        if data.discrete:
            hidden = self._hidden(policy, features)
            if policy == len(data.members):
                return hidden
            return self._crossed(hidden, choices[policy])
        samples = choices.shape[2]
        repeated = features.repeat_interleave(samples, 0)
        pairs = data.pairs(repeated, choices[policy : policy + 1].flatten(1, 2))
        return self._hidden(policy, pairs[0]).unflatten(0, (-1, samples)).mean(1)

    def _hidden(self, policy: int, inputs: Tensor) -> Tensor:
        own = [
            (weight[policy : policy + 1], bias[policy : policy + 1]) for weight, bias in self.layers
        ]
        hidden = hidden_features(own, inputs)[0]
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)

    def _crossed(self, hidden: Tensor, action: Tensor) -> Tensor:
        """Every product of a state's feature and an action's probability, or, if too many, both."""
        if hidden.shape[-1] * action.shape[-1] > MAX_FEATURES:
            return torch.cat([hidden, action], -1)
        return (hidden[:, :, None] * action[:, None, :]).flatten(1)


def _expected(
    data: Regression, layers: Layers, table: TensorDictBase, features: Tensor
) -> FloatArray:
    """Every policy's value of the states of ``table``, ``(P + 1, N)``, raw units."""
    parts = [
        data.expected(layers, features[index].to(data.device), data.choices(table[index])).cpu()
        for index in torch.arange(len(table)).split(ROWS_AT_ONCE)
    ]
    return np.asarray(torch.cat(parts, 1).double().numpy() * data.unit)


def _read(
    data: Regression, layers: Layers, steps: Steps, weights: VisitWeights
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights, values and one-step errors of every step, each ``(P + 1, N)``, raw units."""
    parts = []
    for rows in torch.arange(steps.rows).split(ROWS_AT_ONCE):
        index = rows.to(data.device)
        value = steps.value(layers, index)
        error = steps.target(layers, index, rows) - value
        parts.append(torch.stack([weights(steps, index), value.double(), error.double()]).cpu())
    weight, value, error = torch.cat(parts, 2).numpy()
    return weight, value * data.unit, error * data.unit


def _unsupported(
    data: Regression, train: OfflineDataset, steps: Steps, weight: FloatArray, coverage: Coverage
) -> tuple[FloatArray, FloatArray]:
    """Share of each policy's steps outside the log, and the mean over the worst of them.

    The policy's steps are the first states and the states after ``train``'s steps, weighted. For
    the log's own policy, the last one, it is the share of logged steps.
    """
    starts = train.transitions[torch.from_numpy(first_rows(train))]
    rows = torch.linspace(0, len(train) - 1, min(len(train), VISITS_COMPARED)).long()
    after = train.transitions[rows]
    going = ~(steps.terminated | steps.stopped).cpu().numpy()[rows.numpy()]
    scale = len(train) / len(rows) / len(starts)
    chosen = [data.choices(states(starts)), data.choices(states(after, following=True))]
    at_start = coverage.unsupported_choices(starts, chosen[0].cpu())
    later = coverage.unsupported_choices(after, chosen[1].cpu(), following=True)
    outside = torch.cat([at_start, later], 1).double().numpy()
    followed = data.discount * weight[:, rows.numpy()] * going * scale
    visits = np.concatenate([np.full((len(weight), len(starts)), 1 / len(starts)), followed], 1)
    share, worst = [], []
    for own, mass in zip(outside, visits, strict=True):
        order = np.argsort(-own)
        reached = np.cumsum(mass[order]) / mass.sum()
        tail = np.diff(np.minimum(reached, WORST_SHARE), prepend=0.0)
        share.append(float(own @ mass / mass.sum()))
        worst.append(float(tail @ own[order] / WORST_SHARE))
    share[-1], worst[-1] = 1 - USUAL, 0.0
    return np.clip(share, 0, 1), np.clip(worst, 0, 1)
