"""Estimators of a policy's value: scores of episodes whose mean is the estimate.

Three functions share one signature, ``(episodes, policy, behaviour, model) -> scores (E,)``:
:func:`per_decision`, :func:`direct_method` and :func:`doubly_robust`. ``policy`` and ``behaviour``
are log-probabilities of the logged actions, ``(N,)``; ``behaviour`` is None where they are unknown.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.selection.bounds import FloatArray
from iql_torchrl.selection.episodes import Episodes

LARGEST_LOG_WEIGHT = 600.0  # exp of it times a return is a number
DEVIATIONS = 2.0  # standard errors that a mean weight may lie below 1 before mass counts as missing
WRONG, CLIPPED = 4.0, 10.0  # standard errors above 1 that show wrong propensities


class ModelValues(NamedTuple):
    """What a fitted model says of one policy on E episodes of N transitions.

    Attributes:
        initial: V of each episode's first state, ``(E,)``.
        action_value: Q of the logged actions, ``(N,)``.
        td_error: ``r + discount V(s') - Q(s, a)``, ``(N,)``.
        weight: discounted visits of the policy relative to the dataset's, ``(N,)``, as the model
            estimates them; read where the behaviour probabilities are unknown.
    """

    initial: FloatArray
    action_value: FloatArray
    td_error: FloatArray
    weight: FloatArray


def step_weights(episodes: Episodes, policy: FloatArray, behaviour: FloatArray) -> FloatArray:
    """``discount**t prod_{k<=t} pi/b(a_k|s_k)`` ``(N,)``; 0 after an episode's first termination."""
    logs, _, inside = padded(policy - behaviour, episodes)
    weight = np.exp(np.minimum(np.cumsum(logs, axis=1), LARGEST_LOG_WEIGHT)) * inside
    return np.asarray(weight[episodes.number, episodes.step] * episodes.discount**episodes.step)


def episode_weights(episodes: Episodes, policy: FloatArray, behaviour: FloatArray) -> FloatArray:
    """``prod_t pi/b(a_t|s_t)`` of each episode up to its first termination, ``(E,)``; mean 1."""
    logs = padded(policy - behaviour, episodes)[0].sum(axis=1)
    return np.asarray(np.exp(np.minimum(logs, LARGEST_LOG_WEIGHT)))


def direct_method(
    episodes: Episodes, policy: FloatArray, behaviour: FloatArray | None, model: ModelValues
) -> FloatArray:
    """The model's value of each first state, ``(E,)``: no correction, so the model's bias stays."""
    return model.initial


def doubly_robust(
    episodes: Episodes, policy: FloatArray, behaviour: FloatArray | None, model: ModelValues
) -> FloatArray:
    """``V(s_0) + sum_t w_t (r_t + discount V(s_{t+1}) - Q(s_t, a_t))``, ``(E,)``.

    With known behaviour probabilities ``w_t`` is exact (:func:`step_weights`), so the mean is unbiased
    whatever the model says: Dudík, Langford, Li 2011, "Doubly robust policy evaluation and learning"
    (arXiv:1103.4601), for one step; Jiang and Li 2016 (arXiv:1511.03722) for sequences. Otherwise
    ``w_t`` is the model's ratio of visits (Kallus and Uehara 2022, arXiv:1909.05850), and the mean is
    right if either the model's values or its visits are.
    """
    weight = model.weight if behaviour is None else step_weights(episodes, policy, behaviour)
    return model.initial + episodes.sums(weight * model.td_error)


def per_decision(
    episodes: Episodes,
    policy: FloatArray,
    behaviour: FloatArray | None,
    model: ModelValues | None = None,
    *,
    continued: float | None = None,
) -> FloatArray:
    """Self-normalised importance sampling of each reward by itself, ``(E,)``.

    The mean is ``sum_t discount**t v_t`` with ``v_t = sum_e w_et r_et / sum_e w_et`` and
    ``w_et = prod_{k<=t} pi/b(a_ek|s_ek)`` (Precup, Sutton, Singh 2000, "Eligibility traces for
    off-policy policy evaluation", section 2). An episode's score is
    ``sum_t discount**t (v_t + w_et / mean(w_t) (r_et - v_t))``; its spread shows the error of the mean.
    After a termination an episode continues with ratio 1 and reward 0; after a truncation it no longer
    counts, unless ``continued`` is given as the return that follows.

    Consistent, biased for few episodes, and within the range of the logged returns per step. Weights
    are formed as differences of logarithms, so long episodes do not overflow. NaN when at some step no
    weight is left. No model is read: the estimate does not depend on generalisation.
    """
    assert behaviour is not None
    ratio, reward, inside = padded(policy - behaviour, episodes)
    alive = inside | ~episodes.never_terminated[:, None]
    if continued is not None:
        ends = np.arange(len(reward)), episodes.lengths - 1
        reward[ends] += continued * episodes.discount * episodes.never_terminated
        alive[:] = True
    logs = np.where(alive, np.cumsum(ratio, axis=1), -np.inf)
    largest = logs.max(axis=0)
    weight = np.exp(logs - np.where(np.isfinite(largest), largest, 0.0))
    if bool((weight.sum(axis=0) <= 0).any()):
        return np.full(len(episodes), np.nan)
    weight = weight / weight.mean(axis=0)
    value = (weight * reward).mean(axis=0)
    scores = value + weight * (reward - value)
    return np.asarray(scores @ episodes.discount ** np.arange(len(value)))


def padded(
    log_ratio: FloatArray, episodes: Episodes
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Transitions ``(N,)`` as ``(E, T)``: log-ratios, rewards, and which of them exist.

    Transitions that an episode holds after its first termination do not count: ratio 1, reward 0.
    """
    steps, lengths = np.arange(int(episodes.lengths.max())), episodes.lengths[:, None]
    rows = episodes.first[:, None] + np.minimum(steps, lengths - 1)
    ended = np.cumsum(episodes.terminated[rows] & (steps < lengths), axis=1)
    inside = (steps < lengths) & (np.pad(ended, ((0, 0), (1, 0)))[:, :-1] == 0)
    ratio, reward = (np.where(inside, each[rows], 0.0) for each in (log_ratio, episodes.reward))
    return ratio, reward, inside


def mean_weight(weight: FloatArray) -> tuple[float, float]:
    """Mean of the episodes' weights ``(E,)`` and its standard error."""
    return float(weight.mean()), float(weight.std() / len(weight) ** 0.5)


def propensities_are_wrong(weight: FloatArray) -> bool:
    """True if the mean of the episodes' weights is far above 1, which exact propensities forbid.

    The largest weights are clipped, which can only lower the mean, because they hide it in noise.
    """
    mean, error = mean_weight(np.minimum(weight, CLIPPED))
    return mean - 1 > WRONG * max(error, 1e-6)


def largest_weight(weight: FloatArray, steps: FloatArray) -> float:
    """Bound of the weight of one more episode, for :func:`bounds.mean_bounds`.

    The largest weight of the ``steps`` seen, or E times the missing mass: exact weights of episodes
    have mean 1, so a mean that is significantly below 1 shows that episodes with large weights were
    not sampled. With no weight at all one more episode has all of it.
    """
    mean, error = mean_weight(weight)
    missing = max(1 - mean - DEVIATIONS * error, 0.0)
    return max(float(steps.max()), len(weight) * missing)


class LoggedLogProb(NamedTuple):
    """Log-probabilities of the held-out actions under a candidate and the behaviour policy, ``(N,)``.

    ``behaviour`` is None where the candidate's value does not rest on them.
    """

    policy: FloatArray
    behaviour: FloatArray | None


class CandidateScores(NamedTuple):
    """Doubly robust scores of a candidate, for the smallest and the largest unknown returns.

    ``deviation``: largest distance of one more episode's score below and above the mean.
    ``effective``: effective number of episodes in the correction (Kish).
    """

    scores: FloatArray
    scores_high: FloatArray
    deviation: tuple[float, float]
    effective: float


def candidate_scores(
    episodes: Episodes,
    logged: LoggedLogProb,
    models: tuple[ModelValues, ModelValues],
    limits: tuple[float, float],
    largest: float,
) -> CandidateScores:
    """Scores of E held-out episodes and how far one more could be from their mean.

    ``models``: with unknown returns as the smallest and as the largest of ``limits``. ``largest``: the
    largest weight that the model estimates; without known propensities one more episode's score may be
    off by that many times the range of returns. With them, the range of the temporal-difference error
    is used, which is far smaller below the mean where rewards are rare.
    """
    least, most = (doubly_robust(episodes, *logged, model) for model in models)
    if logged.behaviour is None:
        away = largest * (limits[1] - limits[0])
        return CandidateScores(least, most, (away, away), episodes.effective(models[0].weight))
    weight = step_weights(episodes, logged.policy, logged.behaviour)
    reach = largest_weight(episode_weights(episodes, logged.policy, logged.behaviour), weight)
    value = models[0].action_value
    below, above = (
        max(float(side), 0.0) for side in (value.max() - limits[0], limits[1] - value.min())
    )
    return CandidateScores(least, most, (reach * below, reach * above), episodes.effective(weight))
