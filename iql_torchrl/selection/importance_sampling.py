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
from iql_torchrl.selection.bounds import mean_bounds
from iql_torchrl.selection.candidates import (
    Member,
    log_densities,
    log_probabilities,
    resolve_member,
    resolve_members,
)
from iql_torchrl.selection.episodes import (
    FloatArray,
    check_logs,
    first_rows,
    open_ended,
    raw_rewards,
    return_range,
    returns_to_go,
    states,
    terminations,
)

__all__ = [
    "Importance",
    "behaviour_log_prob",
    "importance_sampling",
    "logged_log_prob",
    "padded",
    "pdwis",
    "value_bounds",
]


LARGEST_LOG_WEIGHT = 600.0  # exp of it times a return is a number


@dataclass(frozen=True)
class Importance:
    """The result of :func:`importance_sampling` for P members, in raw reward units.

    Attributes:
        names: of the members, ``(P,)``.
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
    members: Mapping[str, Any],
    log: OfflineDataset,
    *,
    behaviour: Any,
    discount: float,
    deterministic: bool = False,
    confidence: float = 0.95,
    return_limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Importance:
    """Value of each member's policy from ``log``'s rewards alone: :func:`pdwis` per member.

    Args:
        members: name to ``Agent`` or TorchRL actor; continuous ones need a density.
        log: episodes that the members were not trained on.
        behaviour: the policy that chose the logged actions: a key of its log-probabilities in the
            data (``"action_log_prob"``; exact if these are correct), or a model of it: an ``Agent``
            or actor, such as behaviour cloning trained on other episodes.
        discount: in [0, 1].
        deterministic: evaluate the policy that takes the most probable discrete action, instead of
            the policy that samples. Continuous policies always sample.
        confidence: of each member's interval, in (0, 1).
        return_limits: smallest and largest possible return; None takes both from the log,
            :func:`episodes.return_range`.
        seed: of the bounds' draws.

    Raises:
        TypeError, ValueError: a member that is not a policy, has no density or does not fit the
            data, a key that the data lack, or a logged action with probability 0 under
            ``behaviour``.
    """
    resolved = resolve_members(members)
    check_logs(log, log, discount)
    logged = behaviour_log_prob(behaviour, log)
    limits = return_range(discount, log) if return_limits is None else return_limits
    values, weights, sizes = [], [], []
    for member in resolved:
        ratio = (logged_log_prob(member, log, deterministic=deterministic) - logged).numpy()
        ratios, rewards, alive = padded(ratio, log)
        values.append(pdwis(ratios, rewards, alive, discount))
        weights.append(np.exp(np.minimum(ratios.sum(axis=1), LARGEST_LOG_WEIGHT)))
        sizes.append(_effective_sample_size(ratios.sum(axis=1)))
    low, high = value_bounds(
        np.array(weights), log, discount, limits, confidence=confidence, seed=seed
    )
    names = tuple(member.name for member in resolved)
    episodes = len(log.episode_lengths)
    return Importance(names, discount, np.array(values), low, high, np.array(sizes), episodes)


def value_bounds(
    weights: FloatArray,
    log: OfflineDataset,
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
    logged = returns_to_go(log, discount)[first_rows(log)]
    left = float(discount) ** log.episode_lengths * open_ended(log)
    above = weights * np.maximum(logged + left * low - low, 0)
    below = weights * np.maximum(high - logged - left * high, 0)
    parts = np.concatenate([above, below])
    unbounded = np.full(len(parts), np.inf)
    least, _ = mean_bounds(
        parts, np.zeros(len(parts)), unbounded, together=False, confidence=confidence, seed=seed
    )
    gain, loss = np.split(least, 2)
    return np.minimum(low + gain, high), np.maximum(high - loss, low)


def pdwis(log_ratio: FloatArray, reward: FloatArray, alive: FloatArray, discount: float) -> float:
    """``sum_t discount**t * sum_e w_et r_et / sum_e w_et``, ``w_et = prod_{k<=t} pi/b(a_ek|s_ek)``.

    All ``(E, T)``: logarithms of the ratios per step, rewards, and which steps count (1 or 0).
    After a termination an episode continues with ratio 1 and reward 0, as in an absorbing state;
    after a truncation it no longer counts. Consistent, biased for few episodes,
    and within the range of the log's returns per step. Weights are formed as differences of
    logarithms, so long episodes do not overflow. NaN when at some step no weight is left.
    """
    weight = _weights(log_ratio, alive)
    total = weight.sum(axis=0)
    powers = _powers(discount, reward.shape[1])
    return _ratio_sum((weight * reward).sum(axis=0), total, powers)


def logged_log_prob(member: Member, log: OfflineDataset, *, deterministic: bool = False) -> Tensor:
    """log pi(a|s) of the logged actions, float64 ``(N,)``; raises as ``members`` does."""
    rows = log.transitions
    if not isinstance(log.action_space, spaces.Discrete):
        return log_densities(member, rows)
    table = log_probabilities(
        member, states(rows), int(log.action_space.n), deterministic=deterministic
    )
    return F.pick_action(table, rows["action"], leading=0)


def behaviour_log_prob(behaviour: Any, log: OfflineDataset) -> Tensor:
    """log b(a|s) of the logged actions, float64 ``(N,)``, from a key of the data or a model.

    Raises ``ValueError`` for a key that the data lack, a shape other than one number a step, NaN
    or infinite numbers, and log-probabilities of discrete actions above 0.
    """
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
        result = logged_log_prob(resolve_member("behaviour", behaviour), log)
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


def _effective_sample_size(log_weights: FloatArray) -> float:
    whole = torch.from_numpy(log_weights)
    whole = (whole - whole.max()).exp().nan_to_num(0.0)  # -inf less -inf: no episode has weight
    return float(F.effective_sample_size(whole))


def padded(log_ratio: FloatArray, log: OfflineDataset) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Rows ``(N,)`` as ``(E, T)``: log-ratios, raw rewards, and which steps count; see pdwis.

    Rows that an episode holds after its first termination have ratio 1 and reward 0.
    """
    starts, lengths = first_rows(log), log.episode_lengths
    longest = int(lengths.max())
    steps = np.arange(longest)
    rows = starts[:, None] + np.minimum(steps, lengths[:, None] - 1)
    ended = np.cumsum(terminations(log)[rows] & (steps < lengths[:, None]), axis=1)
    inside = (steps < lengths[:, None]) & (np.pad(ended, ((0, 0), (1, 0)))[:, :-1] == 0)
    alive = inside | ~open_ended(log)[:, None]
    ratios = np.where(inside, log_ratio[rows], 0.0)
    rewards = np.where(inside, raw_rewards(log)[rows], 0.0)
    return ratios, rewards, alive.astype(np.float64)


def _weights(log_ratio: FloatArray, alive: FloatArray) -> FloatArray:
    """Weights ``(E, T)`` relative to each step's largest, 0 where an episode does not count."""
    logs = np.where(alive > 0, np.cumsum(log_ratio, axis=1), -np.inf)
    largest = logs.max(axis=0)
    weight: FloatArray = np.exp(logs - np.where(np.isfinite(largest), largest, 0.0))
    return weight


def _powers(discount: float, steps: int) -> FloatArray:
    return np.asarray(float(discount) ** np.arange(steps), np.float64)


def _ratio_sum(numerator: FloatArray, total: FloatArray, powers: FloatArray) -> float:
    if bool((total <= 0).any()):
        return float("nan")
    return float((powers * numerator / total).sum())
