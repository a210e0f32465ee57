"""Values of policies in the empirical model of a dataset with few distinct states and actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDictBase

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.bounds import FloatArray
from iql_torchrl.selection.candidates import Candidate, log_probabilities, states
from iql_torchrl.selection.episodes import Episodes, EpisodeScores, return_range
from iql_torchrl.selection.estimators import (
    LOG_PROB,
    LoggedLogProb,
    ModelValues,
    episode_scores,
)

IntArray = NDArray[np.int64]

MAX_STATES, MAX_CATEGORIES = 5_000, 20_000
ROWS_PER_PAIR = 10
PROBED_ROWS = 2_000
OFTEN_VISITED, VISITS_CONFIDENCE = 0.01, 0.95
LARGEST_DISCOUNT = 1 - 1e-9  # finite values also of a policy that never terminates in the model


class FiniteStates(NamedTuple):
    """The S distinct states of two datasets, and the state before and after each transition.

    ``representatives``: the policies' inputs in each state, batch ``(S,)``.
    """

    representatives: TensorDictBase
    train: IntArray
    train_next: IntArray
    held_out: IntArray
    held_out_next: IntArray


def finite_states(train: OfflineDataset, held_out: OfflineDataset) -> FiniteStates | None:
    """The states of the datasets if actions are discrete and a table can be filled; otherwise None.

    A table can be filled if there are at most 5,000 states, or 20,000 categories, and at least half
    of all transitions belong to a pair of state and action with 10 transitions or more. States differ
    if any observation key or the action mask differs.
    """
    if not isinstance(train.action_space, spaces.Discrete):
        return None
    tables = [
        states(part.transitions, following=following)
        for part in (train, held_out)
        for following in (False, True)
    ]
    categories = isinstance(train.observation_space, spaces.Discrete)
    if not categories:
        probed = _columns(tables[0][torch.linspace(0, len(train) - 1, PROBED_ROWS).long()])
        if len(np.unique(probed, axis=0)) > PROBED_ROWS // 2:
            return None
    columns = np.concatenate([_columns(table) for table in tables])
    every, first, index = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    index, ends = index.reshape(-1), np.cumsum([len(table) for table in tables])[:-1]
    taken = np.concatenate([part.transitions["action"].reshape(-1) for part in (train, held_out)])
    state = np.concatenate(np.split(index, ends)[::2])
    _, pair, count = np.unique(
        state * int(train.action_space.n) + taken, return_inverse=True, return_counts=True
    )
    most = MAX_CATEGORIES if categories else MAX_STATES
    if len(every) > most or np.median(count[pair.reshape(-1)]) < ROWS_PER_PAIR:
        return None
    representatives = torch.cat(tables)[torch.from_numpy(first)]
    return FiniteStates(representatives, *np.split(index, ends))


def _columns(table: TensorDictBase) -> FloatArray:
    """Every leaf as numbers, ``(N, D)``."""
    keys = sorted(table.keys(include_nested=True, leaves_only=True), key=str)
    flat = [table.get(key).reshape(len(table), -1).double().cpu().numpy() for key in keys]
    return np.concatenate(flat, axis=1)


def table_scores(
    candidates: tuple[Candidate, ...],
    train: Episodes,
    held_out: Episodes,
    finite: FiniteStates,
    logged: Sequence[LoggedLogProb],
    *,
    min_count: int,
    deterministic: bool,
) -> EpisodeScores:
    """Doubly robust scores of ``held_out``'s episodes by the empirical model of ``train``.

    The model's values are the fixed point of fitted Q evaluation with one number per state and
    action, solved exactly. Where a candidate would take an action that ``train`` contains fewer than
    ``min_count`` times in that state, or ``held_out`` never, its episode stops with the smallest
    return from any state of either dataset (Liu, Swaminathan, Agarwal, Brunskill 2020, "Provably good
    batch reinforcement learning without great exploration", arXiv:2007.08202).

    Where ``logged`` has no propensities, the weight of a step (:func:`estimators.doubly_robust`) is
    the candidate's discounted visits of (s, a) in the model over those held out.
    """
    model = _Model(train, held_out, finite, min_count)
    policies = [
        log_probabilities(
            candidate, finite.representatives, model.count.shape[1], deterministic=deterministic
        )
        for candidate in candidates
    ]
    models, unsupported, worst = zip(
        *(model.candidate(policy.exp().numpy() * model.supported) for policy in policies),
        strict=True,
    )
    visits = model.factors(model.frequency * model.supported).solve(model.start, trans="T")
    ends = model.well_known[finite.held_out_next[held_out.last]]
    return episode_scores(
        held_out,
        logged,
        models,
        model.limits,
        [low.weight.max() for low, _ in models],
        **model.behaviour(),
        unsupported=np.clip(unsupported, 0, 1),
        behaviour_unsupported=float(np.clip(visits @ model.usual, 0, 1)),
        worst_unsupported=np.clip(worst, 0, 1),
        uncovered_ends=float((held_out.truncation_weight * ~ends).mean()),
        history=model.history(),
    )


class _Model:
    """Mean rewards and transition frequencies of ``train``, and the steps that correct them.

    Policies are ``(S, A)``. Where the row of a state sums to less than 1, the episode stops in that
    state with the remaining probability.
    """

    def __init__(
        self, train: Episodes, held_out: Episodes, finite: FiniteStates, least: int
    ) -> None:
        self.held_out, self.episodes = held_out, len(train)
        self.discount = min(train.discount, LARGEST_DISCOUNT)
        self.state, self.next_state = finite.held_out, finite.held_out_next
        self.limits = return_range(train, held_out)
        shape = (len(finite.representatives), int(train.dataset.action_space.n))  # type: ignore[attr-defined]
        taken, self.action = (
            part.dataset.transitions["action"].reshape(-1).cpu().numpy()
            for part in (train, held_out)
        )
        pair, size = finite.train * shape[1] + taken, shape[0] * shape[1]
        count = np.bincount(pair, minlength=size).astype(np.float64)
        each, going = np.maximum(count, 1), ~train.terminated
        self.count = count.reshape(shape)
        self.reward = (np.bincount(pair, train.reward, size) / each).reshape(shape)
        self.following = scipy.sparse.csr_matrix(
            (1 / each[pair[going]], (pair[going], finite.train_next[going])), (size, shape[0])
        )
        self.start = np.bincount(finite.train[train.first], minlength=shape[0]) / len(train)
        # the states in which episodes were truncated, discounted
        ends = finite.train_next[train.last]
        self.cut = np.bincount(ends, train.truncation_weight, shape[0]) / len(train)
        self.pair = finite.held_out * shape[1] + self.action
        self.fresh = np.bincount(self.pair, minlength=size).astype(np.float64)
        visited = self.count.sum(1, keepdims=True)
        self.frequency = self.count / np.maximum(visited, 1)
        self.well_known = visited[:, 0] >= least
        # held-out steps cannot correct a pair that they lack
        self.supported = (self.count >= least) & (self.fresh.reshape(shape) > 0)
        # probability of an unsupported action under the behaviour policy
        self.usual = 1 - (self.frequency * self.supported).sum(1)

    def factors(self, policy: FloatArray) -> scipy.sparse.linalg.SuperLU:
        """LU factors of ``I - discount P``: solved for rewards ``(S,)`` V, transposed visits."""
        states, actions = policy.shape
        choose = scipy.sparse.csr_matrix(
            (policy.reshape(-1), np.arange(policy.size), np.arange(0, policy.size + 1, actions)),
            (states, policy.size),
        )
        steps = scipy.sparse.identity(states) - self.discount * (choose @ self.following)
        return scipy.sparse.linalg.splu(steps.tocsc())

    def values(
        self, policy: FloatArray, factors: scipy.sparse.linalg.SuperLU, stop_value: float
    ) -> FloatArray:
        """V ``(S,)`` of the policy; an episode that stops returns ``stop_value``."""
        stop = 1 - policy.sum(1)
        return np.asarray(factors.solve((policy * self.reward).sum(1) + stop * stop_value))

    def outcomes(self, value: FloatArray) -> FloatArray:
        """``r + discount V(s')`` of the held-out transitions ``(N,)``."""
        going = self.discount * ~self.held_out.terminated
        return np.asarray(self.held_out.reward + going * value[self.next_state])

    def candidate(self, policy: FloatArray) -> tuple[tuple[ModelValues, ModelValues], float, float]:
        """Values of one policy, given its supported part, for both limits of unknown returns.

        Also the discounted probability that an episode reaches an unsupported action, and the
        largest such probability in one state.
        """
        first, factors = self.state[self.held_out.first], self.factors(policy)
        visits = factors.solve(self.start, trans="T")
        weight = (visits[:, None] * policy * len(first)).reshape(-1) / np.maximum(self.fresh, 1)
        models = []
        for limit in self.limits:
            value = self.values(policy, factors, limit)
            action_value = self.reward.reshape(-1) + self.discount * (self.following @ value)
            logged = np.where(self.supported.reshape(-1), action_value, limit)[self.pair]
            td_error = self.outcomes(value) - logged
            models.append(ModelValues(value[first], logged, td_error, weight[self.pair]))
        stop = 1 - policy.sum(1)
        # upper confidence bound of the number of visits: a finite dataset has few of rare states
        most = scipy.stats.chi2.ppf(VISITS_CONFIDENCE, 2 * (visits * self.episodes + 1)) / 2
        often = (visits > 0) & (most >= OFTEN_VISITED * self.episodes)
        worst = float(((stop - self.usual) * often).max())
        return (models[0], models[1]), float(visits @ stop), worst

    def behaviour(self) -> dict[str, Any]:
        """The behaviour policy's fields of ``EpisodeScores``.

        An episode's score is its return, and where it was truncated the value of its last state under
        the dataset's frequencies of actions, corrected by held-out steps like the candidates' values. A
        state with too few transitions in ``train`` has the smallest or largest return.
        """
        policy, held_out = self.frequency * self.well_known[:, None], self.held_out
        factors, fresh = self.factors(policy), np.bincount(self.state, minlength=len(policy))
        visits = factors.solve(self.cut, trans="T")
        weight = visits * len(held_out) / np.maximum(fresh, 1) * self.well_known
        returns = held_out.returns_to_go[held_out.first]
        scores = []
        for limit in self.limits:
            value = self.values(policy, factors, limit)
            after = held_out.truncation_weight * value[self.next_state[held_out.last]]
            correction = weight[self.state] * (self.outcomes(value) - value[self.state])
            scores.append(returns + after + held_out.sums(correction))
        return {
            "behaviour_scores": scores[0],
            "behaviour_scores_high": scores[1],
            "behaviour_max_deviation": float(weight.max()) * (self.limits[1] - self.limits[0]),
        }

    def history(self) -> dict[str, float]:
        """How strongly held-out outcomes depend on more than state and action, as t statistics.

        The residual of a step is ``r + discount V(s')``, V of the behaviour policy, minus its mean for
        the state and action. If states have the Markov property, residuals are uncorrelated with
        everything earlier (Shi, Wan, Song, Lu, Leng 2020, "Does the Markov decision process fit the
        data", arXiv:2002.01751), here the quantities in ``earlier``, each also minus its mean. A logged
        probability differs within a state only if the behaviour policy used more than the state.
        Episodes are the independent units. Of the statistics of all actions, which could cancel, the
        one with the largest magnitude is returned.
        """
        first, number = self.held_out.first, self.held_out.number
        factors = self.factors(self.frequency)
        outcome = self.outcomes(self.values(self.frequency, factors, self.limits[0]))
        residual = self._minus_mean(outcome)
        before = np.concatenate([[0.0], residual[:-1]])
        before[first] = 0.0
        so_far = np.concatenate([[0], np.cumsum(self.action)])[:-1]
        earlier = {
            "the number of the step": np.arange(len(residual)) - first[number],
            "the step before": before,
            "the actions before": so_far - so_far[first][number],
            "the number of the episode": number,
        }
        rows = self.held_out.dataset.transitions
        if LOG_PROB in rows:
            logged = rows[LOG_PROB].reshape(-1).double().cpu().numpy()
            earlier["the logged probability of the action"] = np.exp(np.minimum(logged, 0))
        shape = len(first), self.count.shape[1]
        place, result = number * shape[1] + self.action, {}
        for name, values in earlier.items():
            products = residual * self._minus_mean(np.asarray(values, np.float64))
            summed = np.bincount(place, products, shape[0] * shape[1]).reshape(shape)
            norm = np.sqrt(np.square(summed).sum(0))
            statistics = summed.sum(0) / np.maximum(norm, 1e-9 * max(np.abs(outcome).max(), 1e-300))
            result[name] = float(statistics[np.abs(statistics).argmax()])
        return result

    def _minus_mean(self, values: FloatArray) -> FloatArray:
        """Values of held-out transitions ``(N,)`` minus the mean of their state and action."""
        mean = np.bincount(self.pair, values, len(self.fresh)) / np.maximum(self.fresh, 1)
        return np.asarray(values - mean[self.pair])
