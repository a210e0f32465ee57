"""Weighted per-decision importance sampling: the log's rewards reweighted to another policy.

Precup, Sutton, Singh 2000, "Eligibility traces for off-policy policy evaluation", section 2; the
weighted per-decision form. No model is fitted, so the estimate does not depend on generalisation;
but a few episodes may have nearly all the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.bounds import FloatArray, mean_bounds
from iql_torchrl.selection.candidates import logged_log_prob, resolve_candidate, resolve_candidates
from iql_torchrl.selection.episodes import Episodes, read_datasets, return_range

LARGEST_LOG_WEIGHT = 600.0  # exp of it times a return is a number


@dataclass(frozen=True)
class Importance:
    """The result of :func:`importance_sampling` for P candidates, in raw reward units.

    Attributes:
        names: of the candidates, ``(P,)``.
        discount: of the values.
        values: estimates, ``(P,)``; NaN where at some step no episode has weight.
        low, high: bounds of each single value, ``(P,)``: :func:`value_bounds`.
        effective_sample_size: Kish's, of the weights of complete episodes, ``(P,)``, in
            [0, episodes].
        episodes: number of episodes.
    """

    names: tuple[str, ...]
    discount: float
    values: FloatArray
    low: FloatArray
    high: FloatArray
    effective_sample_size: FloatArray
    episodes: int


def importance_sampling(
    candidates: Mapping[str, Any],
    log: OfflineDataset,
    *,
    behaviour: Any,
    discount: float,
    deterministic: bool = False,
    confidence: float = 0.95,
    return_limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Importance:
    """Value of each candidate's policy from ``log``'s rewards alone: :func:`pdwis` per candidate.

    Args:
        candidates: name to ``Agent`` or TorchRL actor; continuous ones need a density.
        log: episodes that the candidates were not trained on.
        behaviour: the policy that chose the logged actions: a key of its log-probabilities in the
            data (``"action_log_prob"``; exact if these are correct), or a model of it: an ``Agent``
            or actor, such as behaviour cloning trained on other episodes.
        discount: in [0, 1].
        deterministic: evaluate the policy that takes the most probable discrete action, instead of
            the policy that samples. Continuous policies always sample.
        confidence: of each candidate's interval, in (0, 1).
        return_limits: smallest and largest possible return; None takes both from the log,
            :func:`episodes.return_range`.
        seed: of the bounds' draws.

    Raises:
        TypeError, ValueError: a candidate that is not a policy, has no density or does not fit the
            data, a key that the data lack, or a logged action with probability 0 under
            ``behaviour``.
    """
    resolved = resolve_candidates(candidates)
    episodes, _ = read_datasets(log, log, discount)
    logged = _behaviour_log_prob(behaviour, log)
    limits = return_range(discount, episodes) if return_limits is None else return_limits
    values, weights, sizes = [], [], []
    for candidate in resolved:
        ratio = logged_log_prob(candidate, log, deterministic=deterministic) - logged
        ratios, rewards, alive = padded(ratio.numpy(), episodes)
        values.append(pdwis(ratios, rewards, alive, discount))
        whole = ratios.sum(axis=1)
        weights.append(np.exp(np.minimum(whole, LARGEST_LOG_WEIGHT)))
        sizes.append(float(F.effective_sample_size(torch.from_numpy(_relative(whole)))))
    low, high = value_bounds(
        np.array(weights), episodes, discount, limits, confidence=confidence, seed=seed
    )
    names = tuple(candidate.name for candidate in resolved)
    return Importance(names, discount, np.array(values), low, high, np.array(sizes), len(episodes))


def pdwis(log_ratio: FloatArray, reward: FloatArray, alive: FloatArray, discount: float) -> float:
    """``sum_t discount**t * sum_e w_et r_et / sum_e w_et``, ``w_et = prod_{k<=t} pi/b(a_ek|s_ek)``.

    All ``(E, T)``: logarithms of the ratios per step, rewards, and which steps count (1 or 0).
    After a termination an episode continues with ratio 1 and reward 0, as in an absorbing state;
    after a truncation it no longer counts. Consistent, biased for few episodes,
    and within the range of the log's returns per step. Weights are formed as differences of
    logarithms, so long episodes do not overflow. NaN when at some step no weight is left.
    """
    weight = _relative(np.where(alive > 0, np.cumsum(log_ratio, axis=1), -np.inf))
    total = weight.sum(axis=0)
    if bool((total <= 0).any()):
        return float("nan")
    powers = float(discount) ** np.arange(reward.shape[1])
    return float((powers * (weight * reward).sum(axis=0) / total).sum())


def _relative(logs: FloatArray) -> FloatArray:
    """``exp(logs)`` of E episodes ``(E, ...)`` over the largest; 0 where none has weight."""
    largest = logs.max(axis=0)
    return np.exp(logs - np.where(np.isfinite(largest), largest, 0.0))


def padded(log_ratio: FloatArray, log: Episodes) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Rows ``(N,)`` as ``(E, T)``: log-ratios, raw rewards, and which steps count; see pdwis.

    Rows that an episode holds after its first termination have ratio 1 and reward 0.
    """
    steps, lengths = np.arange(int(log.lengths.max())), log.lengths[:, None]
    rows = log.first[:, None] + np.minimum(steps, lengths - 1)
    ended = np.cumsum(log.terminated[rows] & (steps < lengths), axis=1)
    inside = (steps < lengths) & (np.pad(ended, ((0, 0), (1, 0)))[:, :-1] == 0)
    alive = inside | ~log.never_terminated[:, None]
    ratios, rewards = (np.where(inside, values[rows], 0.0) for values in (log_ratio, log.reward))
    return ratios, rewards, alive.astype(np.float64)


def value_bounds(
    weights: FloatArray,
    log: Episodes,
    discount: float,
    limits: tuple[float, float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray]:
    """Bounds of each policy's value from the weights ``(P, E)`` of the log's complete episodes.

    With returns within ``limits`` and weights of mean 1, a value is ``low + mean(w (G - low))`` and
    ``high - mean(w (high - G))``. Both means are of quantities of at least 0, so their lower bounds
    (:func:`bounds.mean_bounds`) need no bound of the weights: where the log has few of a policy's
    episodes, the interval widens to the limits (compare Thomas, Theocharous, Ghavamzadeh 2015,
    "High-confidence off-policy evaluation", AAAI). The return after a truncation is taken as the
    lowest or the highest. If the behaviour probabilities are wrong and the mean weight is much
    larger than 1, the lower bound may be above the upper one.
    """
    low, high = limits
    returns, left = log.returns_to_go(discount)[log.first], log.truncation_weight(discount)
    above = weights * np.maximum(returns + left * low - low, 0)
    below = weights * np.maximum(high - returns - left * high, 0)
    parts = np.concatenate([above, below])
    least, _ = mean_bounds(
        parts, np.zeros(len(parts)), np.full(len(parts), np.inf),
        together=False, confidence=confidence, seed=seed,
    )  # fmt: skip
    gain, loss = np.split(least, 2)
    return np.minimum(low + gain, high), np.maximum(high - loss, low)


def _behaviour_log_prob(behaviour: Any, log: OfflineDataset) -> Tensor:
    """log b(a|s) of the logged actions, float64 ``(N,)``, from a key of the data or a model."""
    if isinstance(behaviour, (str, tuple)):
        source = f"{behaviour!r} of {log.name}"
        values = log.transitions.get(behaviour, None)
        if not isinstance(values, Tensor):
            keys = sorted(map(str, log.transitions.keys(include_nested=True, leaves_only=True)))
            raise ValueError(
                f"the data have no {behaviour!r}; they have {keys}. Give the key of the logged "
                "actions' log-probabilities, or a behaviour model: an agent of temperature 0."
            )
        if values.numel() != len(log):
            raise ValueError(
                f"{source} has shape {tuple(values.shape)}; expected one number for each of the "
                f"{len(log)} steps."
            )
        result = values.reshape(-1).double()
    else:
        source = "the behaviour model"
        result = logged_log_prob(resolve_candidate("behaviour", behaviour), log)
    impossible = ~result.isfinite()
    if isinstance(log.action_space, spaces.Discrete):
        impossible |= result > 1e-6
    if bool(impossible.any()):
        row = int(impossible.nonzero()[0])
        raise ValueError(
            f"{source} gives log-probability {float(result[row]):g} to the logged action in row "
            f"{row}, and there are {int(impossible.sum())} such rows; expected finite logarithms, at "
            "most 0 for discrete actions, because a logged action has a probability above 0."
        )
    return result
