"""Values of policies in the empirical model of a log with few distinct states and actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.candidates import Member, log_probabilities
from iql_torchrl.selection.episodes import (
    LOG_PROB,
    episode_numbers,
    first_rows,
    last_rows,
    open_ended,
    raw_rewards,
    return_range,
    returns_to_go,
    states,
    terminations,
)
from iql_torchrl.selection.scores import EpisodeScores, effective_episodes

__all__ = ["FiniteStates", "finite_states", "table_scores"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_STATES, MAX_CATEGORIES = 5_000, 20_000
VISITS_PER_STATE = 10
PROBED_ROWS = 2_000
OFTEN_VISITED, VISITS_CONFIDENCE = 0.01, 0.95
LARGEST_DISCOUNT = 1 - 1e-9  # a policy that never ends in the model has values all the same


@dataclass(frozen=True)
class FiniteStates:
    """The distinct states of two logs, S of them, and which one each row is in.

    Attributes:
        representatives: one row of each state as policies read it, batch ``(S,)``.
        train, train_next, held_out, held_out_next: state of each row before and after its step.
        num_actions: of the discrete action space.
    """

    representatives: TensorDictBase
    train: IntArray
    train_next: IntArray
    held_out: IntArray
    held_out_next: IntArray
    num_actions: int


def finite_states(train: OfflineDataset, held_out: OfflineDataset) -> FiniteStates | None:
    """The logs' states where they are few, and actions discrete; None where they are not.

    Few means at most 5,000, each with 10 rows on average, or at most 20,000 categories. States
    are told apart by every observation key and, where there is one, the action mask.
    """
    if not isinstance(train.action_space, spaces.Discrete):
        return None
    tables = [
        states(log.transitions, following=following)
        for log in (train, held_out)
        for following in (False, True)
    ]
    category = isinstance(train.observation_space, spaces.Discrete)
    rows = len(train) + len(held_out)
    if not category:
        probed = _columns(tables[0][torch.linspace(0, len(train) - 1, PROBED_ROWS).long()])
        if len(np.unique(probed, axis=0)) > max(PROBED_ROWS // 2, 2):
            return None
    every, index = np.unique(
        np.concatenate([_columns(table) for table in tables]), axis=0, return_inverse=True
    )
    most = MAX_CATEGORIES if category else MAX_STATES
    if len(every) > most or (not category and len(every) > rows / VISITS_PER_STATE):
        return None
    joined = torch.cat(tables)
    index = index.reshape(-1)
    first = np.full(len(every), -1)
    first[index[::-1]] = np.arange(len(index))[::-1]
    before, after, held, held_after = np.split(
        index, np.cumsum([len(table) for table in tables])[:-1]
    )
    representatives = joined[torch.from_numpy(first)]
    actions = int(train.action_space.n)
    return FiniteStates(representatives, before, after, held, held_after, actions)


def _columns(table: TensorDictBase) -> FloatArray:
    """Every leaf as numbers, ``(N, D)``."""
    leaves = [
        table.get(key) for key in sorted(table.keys(include_nested=True, leaves_only=True), key=str)
    ]
    flat = [leaf.reshape(len(table), -1).double().cpu().numpy() for leaf in leaves]
    return np.concatenate(flat, axis=1)


class _Model:
    """Mean rewards and transition frequencies per state and action of a log, and its starts."""

    def __init__(self, log: OfflineDataset, before: IntArray, after: IntArray, size: int) -> None:
        action = log.transitions["action"].reshape(-1).cpu().numpy()
        self.states, self.num_actions = size, int(log.action_space.n)  # type: ignore[attr-defined]
        pairs = size * self.num_actions
        pair = before * self.num_actions + action
        count = np.bincount(pair, minlength=pairs).astype(np.float64)
        self.count = count.reshape(size, self.num_actions)
        self.episodes = len(log.episode_lengths)
        each = np.maximum(count, 1)
        self.reward = np.bincount(pair, raw_rewards(log), pairs) / each
        going = ~terminations(log)
        self.following = scipy.sparse.csr_matrix(
            (1 / each[pair[going]], (pair[going], after[going])), shape=(pairs, size)
        )
        self.start = np.bincount(before[first_rows(log)], minlength=size) / self.episodes

    def solve(
        self, policy: FloatArray, discount: float, left: FloatArray, left_value: FloatArray
    ) -> _Solution:
        """Values of ``policy`` ``(S, A)``, whose rows sum to ``1 - left``.

        With probability ``left`` ``(S,)`` the episode stops in a state with ``left_value``.
        """
        size, pairs = self.following.shape[1], self.following.shape[0]
        row = np.repeat(np.arange(size), self.num_actions)
        choose = scipy.sparse.csr_matrix(
            (policy.reshape(-1), (row, np.arange(pairs))), shape=(size, pairs)
        )
        steps = scipy.sparse.identity(size) - discount * (choose @ self.following)
        factors = scipy.sparse.linalg.splu(steps.tocsc())
        value = factors.solve(choose @ self.reward + left * left_value)
        action_value = self.reward + discount * (self.following @ value)
        return _Solution(factors, value, action_value.reshape(size, -1))


@dataclass(frozen=True)
class _Solution:
    factors: scipy.sparse.linalg.SuperLU
    value: FloatArray  # (S,)
    action_value: FloatArray  # (S, A)

    def visits(self, start: FloatArray) -> FloatArray:
        """Discounted visits of each state per episode that starts as ``start`` ``(S,)`` says."""
        result: FloatArray = self.factors.solve(start, trans="T")
        return result


def table_scores(
    members: tuple[Member, ...],
    train: OfflineDataset,
    held_out: OfflineDataset,
    finite: FiniteStates,
    *,
    discount: float,
    min_count: int,
    deterministic: bool,
) -> EpisodeScores:
    """Doubly robust scores of ``held_out``'s episodes by the empirical model of ``train``.

    The model's values are the fixed point of fitted Q evaluation with one number per state and
    action, so nothing needs to converge. Where a member would take an action that ``train`` holds
    fewer than ``min_count`` times in that state, or ``held_out`` never, its episode stops with the
    least return that either log was seen to lead to (the filter of Liu, Swaminathan, Agarwal,
    Brunskill 2020, "Provably good batch reinforcement learning without great exploration",
    arXiv:2007.08202).

    The score of a held-out episode is ``V(s_0) + sum_t w(s_t, a_t) (r + discount V(s') - Q(s, a))``
    with w the member's discounted visits of (s, a) in the model over those held out (Kallus and Uehara
    2022, "Efficiently breaking the curse of horizon in off-policy evaluation with double
    reinforcement learning", arXiv:1909.05850): the held-out steps correct the model's errors
    and, since each episode corrects them differently, show how large they may be.
    """
    discount = min(discount, LARGEST_DISCOUNT)
    limits = return_range(discount, train, held_out)
    model = _Model(train, finite.train, finite.train_next, len(finite.representatives))
    known = model.count.sum(1) >= max(min_count, 1)
    logged = [
        _log_scores(model, train, held_out, finite, known, discount, limit) for limit in limits
    ]
    fresh = _counts(held_out, finite.held_out, model.count.shape)
    # A pair that is not held out cannot be corrected; weights by held-out frequencies are not
    # biased by members that were fitted to the noise of ``train``.
    supported = (model.count >= max(min_count, 1)) & (fresh > 0)
    frequency = model.count / np.maximum(model.count.sum(1, keepdims=True), 1)
    usual = 1 - (frequency * supported).sum(1)
    columns = []
    for member in members:
        policy = _probabilities(member, finite, deterministic)
        columns.append(
            _member_scores(
                model, held_out, finite, policy * supported, fresh, usual, discount, limits
            )
        )
    scores, scores_high, initial, surprise, share, worst, effective = map(
        np.array, zip(*columns, strict=True)
    )
    solution = model.solve(frequency * supported, discount, usual, usual)
    log_share = float(np.clip(solution.visits(model.start) @ usual, 0, 1))
    ends = finite.held_out_next[last_rows(held_out)]
    left = discount**held_out.episode_lengths * open_ended(held_out)
    unlogged = float((left * ~known[ends]).mean())
    return EpisodeScores(
        scores, logged[0][0], scores_high, logged[1][0], initial, surprise,
        logged[0][1] * (limits[1] - limits[0]), np.clip(share, 0, 1),
        log_share, np.clip(worst, 0, 1), unlogged, limits, effective,
        _history_statistics(model, held_out, finite, fresh, discount, limits[0]),
    )  # fmt: skip


def _counts(log: OfflineDataset, state: IntArray, shape: tuple[int, ...]) -> FloatArray:
    """How often each action was taken in each state, ``(S, A)``."""
    pair = state * shape[1] + log.transitions["action"].reshape(-1).cpu().numpy()
    count = np.bincount(pair, minlength=shape[0] * shape[1]).reshape(shape)
    return np.asarray(count, np.float64)


def _member_scores(
    model: _Model,
    held_out: OfflineDataset,
    finite: FiniteStates,
    kept: FloatArray,
    fresh: FloatArray,
    usual: FloatArray,
    discount: float,
    limits: tuple[float, float],
) -> tuple[FloatArray, FloatArray, FloatArray, float, float, float, float]:
    """The columns of ``EpisodeScores`` of one policy, whose supported part is ``kept`` ``(S, A)``.

    ``fresh`` ``(S, A)``: counts of ``held_out``; ``usual`` ``(S,)``: how probable an unsupported
    action is for the log itself.
    """
    low, high = limits
    first, action = first_rows(held_out), held_out.transitions["action"].reshape(-1).cpu().numpy()
    going = discount * ~terminations(held_out)
    left = 1 - kept.sum(1)
    scores, solutions = [], []
    for limit in limits:
        solution = model.solve(kept, discount, left, np.full(len(left), limit))
        visits = solution.visits(model.start)
        weight = visits[:, None] * kept * len(first) / np.maximum(fresh, 1)
        error = raw_rewards(held_out) + going * solution.value[finite.held_out_next]
        error -= solution.action_value[finite.held_out, action]
        correction = weight[finite.held_out, action] * error
        summed = np.bincount(episode_numbers(held_out), correction, len(first))
        scores.append(solution.value[finite.held_out[first]] + summed)
        solutions.append(solution)
    surprise = float(weight.max()) * (high - low)
    # as often as the state may be visited, given how rarely a rare one is seen in a finite log
    most = scipy.stats.chi2.ppf(VISITS_CONFIDENCE, 2 * (visits * model.episodes + 1)) / 2
    often = (visits > 0) & (most >= OFTEN_VISITED * model.episodes)
    worst = float(((left - usual) * often).max())
    initial = solutions[0].value[finite.held_out[first]]
    share, effective = (
        float(visits @ left),
        effective_episodes(weight[finite.held_out, action], held_out),
    )
    return scores[0], scores[1], initial, surprise, share, worst, effective


def _history_statistics(
    model: _Model,
    held_out: OfflineDataset,
    finite: FiniteStates,
    fresh: FloatArray,
    discount: float,
    unknown_value: float,
) -> dict[str, float]:
    """How strongly held-out outcomes depend on more than state and action, as t statistics.

    The outcome of a step is ``r + discount V(s')``, V the value of the log's own policy. What is
    left of it after subtracting the mean of its state and action is uncorrelated with anything
    earlier if the states have the Markov property (Shi, Wan, Song, Lu, Leng 2020, "Does the Markov
    decision process fit the data", arXiv:2002.01751). Earlier things are tried, each also
    less its mean: the number of the step, what was left at the step before, the sum of the numbers
    of the actions before, the number of the episode, and where it is known the probability with
    which the action was chosen, which differs within a state only if the log's policy acted on
    something else. Episodes are the independent units. Each action has a statistic, because
    dependences of two actions may cancel; the greatest counts.
    """
    visited = model.count.sum(1)
    frequency = model.count / np.maximum(visited[:, None], 1)
    unknown = np.asarray(visited == 0, np.float64)
    value = model.solve(frequency, discount, unknown, np.full(len(visited), unknown_value)).value
    pair = finite.held_out * model.num_actions
    pair = pair + held_out.transitions["action"].reshape(-1).cpu().numpy()
    count = np.maximum(fresh.reshape(-1), 1)

    def less_mean(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(pair, values, len(count)) / count)[pair])

    outcome = raw_rewards(held_out)
    outcome += discount * ~terminations(held_out) * value[finite.held_out_next]
    left, number = less_mean(outcome), episode_numbers(held_out)
    first = first_rows(held_out)
    before = np.concatenate([[0.0], left[:-1]])
    before[first] = 0.0
    action = held_out.transitions["action"].reshape(-1).cpu().numpy()
    so_far = np.concatenate([[0], np.cumsum(action)])[:-1]
    earlier = {
        "the number of the step": np.arange(len(left)) - first[number],
        "the step before": before,
        "the actions before": so_far - so_far[first][number],
        "the number of the episode": number,
    }
    if LOG_PROB in held_out.transitions:
        logged = held_out.transitions[LOG_PROB].reshape(-1).double().cpu().numpy()
        earlier["the logged probability of the action"] = np.exp(np.minimum(logged, 0))
    result = {}
    place, size = number * model.num_actions + action, len(first) * model.num_actions
    for name, values in earlier.items():
        products = left * less_mean(np.asarray(values, np.float64))
        summed = np.bincount(place, products, size).reshape(len(first), -1)
        norm = np.sqrt(np.square(summed).sum(0))
        statistics = summed.sum(0) / np.maximum(norm, 1e-9 * max(np.abs(outcome).max(), 1e-300))
        result[name] = float(statistics[np.abs(statistics).argmax()])
    return result


def _probabilities(member: Member, finite: FiniteStates, deterministic: bool) -> FloatArray:
    table: Tensor = log_probabilities(
        member, finite.representatives, finite.num_actions, deterministic=deterministic
    )
    return np.asarray(table.exp().numpy(), np.float64)


def _log_scores(
    model: _Model,
    train: OfflineDataset,
    held_out: OfflineDataset,
    finite: FiniteStates,
    known: NDArray[np.bool_],
    discount: float,
    limit: float,
) -> tuple[FloatArray, float]:
    """Scores of the log's own policy, ``(E,)``, and the greatest weight of a correcting step.

    An episode's return, and where it was truncated the value of its last state under the log's
    own frequencies of actions, corrected by held-out steps like the members' values. A state that
    is not ``known`` ``(S,)``, because ``train`` hardly describes it, counts as ``limit``.
    """
    visited = model.count.sum(1)
    frequency = model.count * known[:, None] / np.maximum(visited[:, None], 1)
    unknown = np.asarray(~known, np.float64)
    solution = model.solve(frequency, discount, unknown, np.full(len(visited), limit))
    value = solution.value
    first, last = first_rows(held_out), last_rows(held_out)
    left = discount**held_out.episode_lengths * open_ended(held_out)
    own = discount**train.episode_lengths * open_ended(train)
    tail = np.bincount(finite.train_next[last_rows(train)], own, len(visited)) / model.episodes
    fresh = np.bincount(finite.held_out, minlength=len(visited))
    weight = solution.visits(tail) * len(first) / np.maximum(fresh, 1) * known
    error = raw_rewards(held_out) - value[finite.held_out]
    error += discount * ~terminations(held_out) * value[finite.held_out_next]
    correction = weight[finite.held_out] * error
    scores = returns_to_go(held_out, discount)[first] + left * value[finite.held_out_next[last]]
    scores = scores + np.bincount(episode_numbers(held_out), correction, len(first))
    return np.asarray(scores), float(weight.max())
