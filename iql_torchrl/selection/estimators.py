"""Estimators of a policy's value: scores of episodes whose mean is the estimate.

:func:`per_decision`, :func:`direct_method` and :func:`doubly_robust` share one signature,
``(episodes, policy, behaviour, model) -> scores (E,)``. ``policy`` and ``behaviour`` are
log-probabilities of the logged actions, ``(N,)``; ``behaviour`` is None where they are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.bounds import FloatArray, mean_bounds
from iql_torchrl.selection.candidates import (
    Candidate,
    has_density,
    logged_log_prob,
    resolve_candidate,
    resolve_candidates,
)
from iql_torchrl.selection.episodes import (
    Episodes,
    EpisodeScores,
    check_all_terminate,
    read_datasets,
    return_range,
)

LOG_PROB = "action_log_prob"
ENOUGH, ENOUGH_SHARE = 100.0, 0.1  # effective episodes that long products of ratios must leave
TINY = 1e-300
LARGEST_LOG_WEIGHT = 600.0  # exp of it times a return is a number
DEVIATIONS = 2.0  # standard errors that a mean weight may lie below 1 before mass counts as missing
WRONG, CLIPPED = 4.0, 10.0  # standard errors above 1 that show wrong propensities


class ModelValues(NamedTuple):
    """What a fitted model says of one policy on E episodes of N transitions.

    Attributes:
        initial: V of each episode's first state, ``(E,)``.
        action_value: Q of the logged actions, ``(N,)``.
        td_error: ``r + discount V(s') - Q(s, a)``, ``(N,)``.
        weight: discounted visits of the policy relative to the dataset's, ``(N,)``; used where the
            behaviour probabilities are unknown.
    """

    initial: FloatArray
    action_value: FloatArray
    td_error: FloatArray
    weight: FloatArray


class LoggedLogProb(NamedTuple):
    """Log-probabilities of the held-out actions under a candidate and the behaviour policy, ``(N,)``.

    ``behaviour`` is None where the candidate's value does not rest on them.
    """

    policy: FloatArray
    behaviour: FloatArray | None


class CandidateScores(NamedTuple):
    """Doubly robust scores of a candidate; each field is a row of the one in ``EpisodeScores``."""

    scores: FloatArray
    scores_high: FloatArray
    deviation: tuple[float, float]
    effective: float


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
    """Self-normalised importance sampling of each reward by itself, ``(E,)``; reads no model.

    The mean is ``sum_t discount**t v_t`` with ``v_t = sum_e w_et r_et / sum_e w_et`` and
    ``w_et = prod_{k<=t} pi/b(a_ek|s_ek)`` (Precup, Sutton, Singh 2000, "Eligibility traces for
    off-policy policy evaluation", section 2). An episode's score is
    ``sum_t discount**t (v_t + w_et / mean(w_t) (r_et - v_t))``; its spread shows the error of the mean.
    After a termination an episode continues with ratio 1 and reward 0; after a truncation it no longer
    counts, unless ``continued`` is given as the return that follows.

    Consistent, biased for few episodes. NaN where at some step no weight is left.
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
    not sampled.
    """
    mean, error = mean_weight(weight)
    missing = max(1 - mean - DEVIATIONS * error, 0.0)
    return max(float(steps.max()), len(weight) * missing)


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
    off by that many times the range of returns. With them, by the largest weight times the range of the
    TD error, which is far smaller below the mean where rewards are rare.
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


def episode_scores(
    episodes: Episodes,
    logged: Sequence[LoggedLogProb],
    models: Sequence[tuple[ModelValues, ModelValues]],
    limits: tuple[float, float],
    largest: Sequence[float],
    **rest: Any,
) -> EpisodeScores:
    """:func:`candidate_scores` of every candidate, and ``rest``: the other fields of the result."""
    scored = [
        candidate_scores(episodes, known, pair, limits, float(most))
        for known, pair, most in zip(logged, models, largest, strict=True)
    ]
    scores, scores_high, deviation, effective = map(np.array, zip(*scored, strict=True))
    return EpisodeScores(
        scores=scores,
        scores_high=scores_high,
        max_score_deviation=deviation,
        effective_episodes=effective,
        initial_values=np.array([low.initial for low, _ in models]),
        return_range=limits,
        exact=np.array([known.behaviour is not None for known in logged]),
        **rest,
    )


@dataclass(frozen=True)
class Importance:
    """The result of :func:`importance_sampling` for P candidates, in raw reward units.

    Attributes:
        values: estimates, ``(P,)``; NaN where at some step no episode has weight.
        low, high: bounds of each single value, ``(P,)``; the whole range of returns for NaN, and
            where ``wrong``.
        effective_sample_size: Kish's, of the weights of complete episodes, ``(P,)``.
        mean_weight: mean weight of complete episodes, ``(P,)``; 1 but for chance.
        wrong: where ``mean_weight`` is so far above 1 that the propensities are wrong, ``(P,)``.
    """

    names: tuple[str, ...]
    discount: float
    values: FloatArray
    low: FloatArray
    high: FloatArray
    effective_sample_size: FloatArray
    mean_weight: FloatArray
    wrong: NDArray[np.bool_]
    episodes: int


def importance_sampling(
    candidates: Mapping[str, Any],
    dataset: OfflineDataset,
    *,
    behaviour: Any,
    discount: float,
    deterministic: bool = False,
    confidence: float = 0.95,
    return_limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Importance:
    """Value of each candidate from logged rewards alone: :func:`per_decision`.

    Args:
        candidates: name to ``Agent`` or TorchRL actor; continuous ones need a density.
        dataset: episodes that the candidates were not trained on.
        behaviour: the behaviour policy: a key of its log-probabilities in the data
            (``"action_log_prob"``), or an ``Agent`` or actor that models it, such as behaviour cloning
            trained on other episodes.
        discount: in [0, 1]; with 1 every episode must terminate, or ``return_limits`` be given.
        deterministic: evaluate the most probable discrete action; continuous policies always sample.
        confidence: of each candidate's interval, in (0, 1).
        return_limits: smallest and largest possible return; None: :func:`episodes.return_range`.
        seed: of the bounds' draws.

    Raises:
        TypeError, ValueError: a candidate that is not a policy, has no density or does not fit the
            data, a key that the data lack, or a logged action with probability 0 under
            ``behaviour``.
    """
    resolved = resolve_candidates(candidates)
    episodes, _ = read_datasets(dataset, dataset, discount)
    if discount == 1 and return_limits is None:
        check_all_terminate(dataset=episodes)
    logged = behaviour_log_prob(behaviour, dataset)
    limits = return_range(episodes) if return_limits is None else return_limits
    policies = [logged_log_prob(c, dataset, deterministic=deterministic).numpy() for c in resolved]
    value, least, most = (
        np.array([per_decision(episodes, policy, logged, continued=after) for policy in policies])
        for after in (None, *limits)
    )
    weights = np.array([episode_weights(episodes, policy, logged) for policy in policies])
    values, mean = value.mean(1), weights.mean(1)
    pairs = zip(weights, mean, strict=True)
    reach = np.array([largest_weight(w / max(m, 1.0), w / max(m, TINY)) for w, m in pairs])
    low, high = mean_bounds(
        least, values - reach * (values - limits[0]), values + reach * (limits[1] - values),
        upper_samples=most, together=False, confidence=confidence, seed=seed,
    )  # fmt: skip
    wrong = np.array([propensities_are_wrong(weight) for weight in weights])
    unknown = np.isnan(values) | wrong
    return Importance(
        names=tuple(candidate.name for candidate in resolved),
        discount=discount,
        values=values,
        low=np.where(unknown, limits[0], np.clip(low, *limits)),
        high=np.where(unknown, limits[1], np.clip(high, *limits)),
        effective_sample_size=np.array([kish(weight) for weight in weights]),
        mean_weight=mean,
        wrong=wrong,
        episodes=len(episodes),
    )


def behaviour_log_prob(behaviour: Any, dataset: OfflineDataset) -> FloatArray:
    """log b(a|s) of the logged actions, float64 ``(N,)``, from a key of the data or a model."""
    if isinstance(behaviour, (str, tuple)):
        source = f"{behaviour!r} of {dataset.name}"
        values = dataset.transitions.get(behaviour, None)
        if not isinstance(values, Tensor):
            keys = sorted(map(str, dataset.transitions.keys(include_nested=True, leaves_only=True)))
            raise ValueError(
                f"the data have no {behaviour!r}; they have {keys}. Give the key of the logged "
                "actions' log-probabilities, or a behaviour model: an agent of temperature 0."
            )
        if values.numel() != len(dataset):
            raise ValueError(
                f"{source} has shape {tuple(values.shape)}; expected one number for each of the "
                f"{len(dataset)} steps."
            )
        result = values.reshape(-1).double().cpu()
    else:
        source = "the behaviour model"
        result = logged_log_prob(resolve_candidate("behaviour", behaviour), dataset)
    impossible = ~result.isfinite()
    if isinstance(dataset.action_space, spaces.Discrete):
        impossible |= result > 1e-6
    if bool(impossible.any()):
        row = int(impossible.nonzero()[0])
        raise ValueError(
            f"{source} gives log-probability {float(result[row]):g} to the logged action in row "
            f"{row}, and there are {int(impossible.sum())} such rows; expected finite logarithms, at "
            "most 0 for discrete actions, because a logged action has a probability above 0."
        )
    return np.asarray(result.numpy())


def kish(weight: FloatArray) -> float:
    """Kish's effective number of episodes from their weights ``(E,)``; 0 where all are 0."""
    relative = torch.from_numpy(weight / max(float(weight.max()), TINY))
    return float(F.effective_sample_size(relative))


def exact_weights(
    candidates: Sequence[Candidate], held_out: Episodes, behaviour: Any, *, deterministic: bool
) -> list[LoggedLogProb]:
    """Log-probabilities of the held-out actions where values rest on known propensities.

    They do for episodes of one step. For longer ones the product of ratios must leave at least 100
    effective episodes and a tenth of all; otherwise the model's weights have smaller errors. Continuous
    actions need a density, so they must be sampled.
    """
    dataset = held_out.dataset
    if behaviour is None and LOG_PROB in dataset.transitions:
        behaviour = LOG_PROB
    unknown = LoggedLogProb(np.empty(0), None)
    if not isinstance(behaviour, (str, tuple)) or (deterministic and held_out.continuous):
        return [unknown] * len(candidates)
    logged, result = behaviour_log_prob(behaviour, dataset), []
    enough = max(ENOUGH, ENOUGH_SHARE * len(held_out)) if held_out.lengths.max() > 1 else 0.0
    for candidate in candidates:
        known = unknown
        if not held_out.continuous or has_density(candidate, dataset):
            policy = logged_log_prob(candidate, dataset, deterministic=deterministic).numpy()
            if kish(episode_weights(held_out, policy, logged)) >= enough:
                known = LoggedLogProb(policy, logged)
        result.append(known)
    return result
