"""Values of policies in the empirical model of a log with few distinct states and actions."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.candidates import Member, log_probabilities
from iql_torchrl.selection.episodes import (
    FloatArray,
    IntArray,
    episode_numbers,
    first_rows,
    last_rows,
    open_ended,
    raw_rewards,
    return_range,
    returns_to_go,
    terminations,
)
from iql_torchrl.selection.finite_states import FiniteStates, finite_states
from iql_torchrl.selection.markov import history_statistics
from iql_torchrl.selection.scores import EpisodeScores, effective_episodes
from iql_torchrl.selection.table_model import TableModel

__all__ = ["FiniteStates", "finite_states", "table_scores"]


OFTEN_VISITED, VISITS_CONFIDENCE = 0.01, 0.95
LARGEST_DISCOUNT = 1 - 1e-9  # finite values also of a policy that never terminates in the model


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
    action, solved exactly. Where a member would take an action that ``train`` contains fewer than
    ``min_count`` times in that state, or ``held_out`` never, its episode stops with the smallest
    return from any state of either log (the filter of Liu, Swaminathan, Agarwal,
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
    model = TableModel(train, finite.train, finite.train_next, len(finite.representatives))
    well_known = model.count.sum(1) >= max(min_count, 1)
    logged = [
        _log_scores(model, train, held_out, finite, well_known, discount, limit) for limit in limits
    ]
    fresh = _counts(held_out, finite.held_out, model.count.shape)
    # Held-out steps cannot correct a pair that they lack. Weights from held-out frequencies are not
    # biased by members that overfit ``train``.
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
    remaining = discount**held_out.episode_lengths * open_ended(held_out)
    unlogged = float((remaining * ~well_known[ends]).mean())
    return EpisodeScores(
        scores, logged[0][0], scores_high, logged[1][0], initial, surprise,
        logged[0][1] * (limits[1] - limits[0]), np.clip(share, 0, 1),
        log_share, np.clip(worst, 0, 1), unlogged, limits, effective,
        history_statistics(model, held_out, finite, fresh, discount, limits[0]),
    )  # fmt: skip


def _counts(log: OfflineDataset, state: IntArray, shape: tuple[int, ...]) -> FloatArray:
    """How often each action was taken in each state, ``(S, A)``."""
    pair = state * shape[1] + log.transitions["action"].reshape(-1).cpu().numpy()
    count = np.bincount(pair, minlength=shape[0] * shape[1]).reshape(shape)
    return np.asarray(count, np.float64)


def _member_scores(
    model: TableModel,
    held_out: OfflineDataset,
    finite: FiniteStates,
    supported_policy: FloatArray,
    fresh: FloatArray,
    usual: FloatArray,
    discount: float,
    limits: tuple[float, float],
) -> tuple[FloatArray, FloatArray, FloatArray, float, float, float, float]:
    """The columns of ``EpisodeScores`` of one policy, given its supported part ``(S, A)``.

    ``fresh`` ``(S, A)``: counts of ``held_out``; ``usual`` ``(S,)``: how probable an unsupported
    action is for the log itself.
    """
    low, high = limits
    first, action = first_rows(held_out), held_out.transitions["action"].reshape(-1).cpu().numpy()
    going = discount * ~terminations(held_out)
    stop = 1 - supported_policy.sum(1)
    scores, solutions = [], []
    for limit in limits:
        solution = model.solve(supported_policy, discount, stop, np.full(len(stop), limit))
        visits = solution.visits(model.start)
        weight = visits[:, None] * supported_policy * len(first) / np.maximum(fresh, 1)
        error = raw_rewards(held_out) + going * solution.value[finite.held_out_next]
        error -= solution.action_value[finite.held_out, action]
        correction = weight[finite.held_out, action] * error
        summed = np.bincount(episode_numbers(held_out), correction, len(first))
        scores.append(solution.value[finite.held_out[first]] + summed)
        solutions.append(solution)
    surprise = float(weight.max()) * (high - low)
    # upper confidence bound of the number of visits, because a finite log has few of rare states
    most = scipy.stats.chi2.ppf(VISITS_CONFIDENCE, 2 * (visits * model.episodes + 1)) / 2
    often = (visits > 0) & (most >= OFTEN_VISITED * model.episodes)
    worst = float(((stop - usual) * often).max())
    initial = solutions[0].value[finite.held_out[first]]
    share, effective = (
        float(visits @ stop),
        effective_episodes(weight[finite.held_out, action], held_out),
    )
    return scores[0], scores[1], initial, surprise, share, worst, effective


def _probabilities(member: Member, finite: FiniteStates, deterministic: bool) -> FloatArray:
    table: Tensor = log_probabilities(
        member, finite.representatives, finite.num_actions, deterministic=deterministic
    )
    return np.asarray(table.exp().numpy(), np.float64)


def _log_scores(
    model: TableModel,
    train: OfflineDataset,
    held_out: OfflineDataset,
    finite: FiniteStates,
    well_known: NDArray[np.bool_],
    discount: float,
    limit: float,
) -> tuple[FloatArray, float]:
    """Scores of the log's own policy, ``(E,)``, and the greatest weight of a correcting step.

    An episode's return, and where it was truncated the value of its last state under the log's
    own frequencies of actions, corrected by held-out steps like the members' values. A state with
    too few rows in ``train``, not ``well_known`` ``(S,)``, has the value ``limit``.
    """
    visited = model.count.sum(1)
    frequency = model.count * well_known[:, None] / np.maximum(visited[:, None], 1)
    unknown = np.asarray(~well_known, np.float64)
    solution = model.solve(frequency, discount, unknown, np.full(len(visited), limit))
    value = solution.value
    first, last = first_rows(held_out), last_rows(held_out)
    remaining = discount**held_out.episode_lengths * open_ended(held_out)
    in_train = discount**train.episode_lengths * open_ended(train)
    tail = np.bincount(finite.train_next[last_rows(train)], in_train, len(visited)) / model.episodes
    fresh = np.bincount(finite.held_out, minlength=len(visited))
    weight = solution.visits(tail) * len(first) / np.maximum(fresh, 1) * well_known
    error = raw_rewards(held_out) - value[finite.held_out]
    error += discount * ~terminations(held_out) * value[finite.held_out_next]
    correction = weight[finite.held_out] * error
    scores = (
        returns_to_go(held_out, discount)[first] + remaining * value[finite.held_out_next[last]]
    )
    scores = scores + np.bincount(episode_numbers(held_out), correction, len(first))
    return np.asarray(scores), float(weight.max())
