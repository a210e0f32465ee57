"""Weighted per-decision importance sampling: the log's rewards reweighted to another policy.

Precup, Sutton, Singh 2000, "Eligibility traces for off-policy policy evaluation", section 2; the
weighted per-decision form. No model is fitted, so no state needs to be generalised to; in exchange
few episodes may carry all the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.members import (
    Member,
    check_logs,
    first_rows,
    log_densities,
    log_probabilities,
    open_ended,
    raw_rewards,
    resolve_member,
    resolve_members,
    states,
)

__all__ = [
    "Importance",
    "behaviour_log_prob",
    "importance_sampling",
    "logged_log_prob",
    "padded",
    "pdwis",
]

FloatArray = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Importance:
    """What :func:`importance_sampling` found; P members, raw reward units.

    Attributes:
        names: of the members, ``(P,)``.
        discount: of the values.
        values: estimates, ``(P,)``; NaN where at some step no episode has weight.
        low, high: 95 % bootstrap bounds over episodes, ``(P,)``.
        effective_sample_size: Kish's, of the episodes' whole weights, ``(P,)``, in [0, episodes].
        episodes: how many there are.
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
    seed: int = 0,
) -> Importance:
    """Value of each member's policy from ``log``'s rewards alone: :func:`pdwis` per member.

    Args:
        members: name to ``Agent`` or TorchRL actor; continuous ones need a density.
        log: episodes that the members were not trained on.
        behaviour: what chose the logged actions. A key of the log-probabilities in the data
            (``"action_log_prob"``; exact where it is true), or a model of them: an ``Agent`` or
            actor, such as behaviour cloning trained on other episodes.
        discount: in [0, 1].
        deterministic: price the most probable of discrete actions instead of the policy as it
            samples. Continuous policies are always priced as they sample.
        seed: of the bootstrap over episodes.

    Raises:
        TypeError, ValueError: a member that is no policy, has no density or does not fit the
            data, a key that the data lack, or a logged action that ``behaviour`` calls impossible.
    """
    resolved = resolve_members(members)
    check_logs(log, log, discount)
    logged = behaviour_log_prob(behaviour, log)
    estimates = []
    for member in resolved:
        ratio = logged_log_prob(member, log, deterministic=deterministic) - logged
        estimates.append(_estimate(ratio.numpy(), log, discount, seed))
    value, low, high, size = np.array(estimates).T
    names = tuple(member.name for member in resolved)
    return Importance(names, discount, value, low, high, size, len(log.episode_lengths))


def pdwis(log_ratio: FloatArray, reward: FloatArray, alive: FloatArray, discount: float) -> float:
    """``sum_t discount**t * sum_e w_et r_et / sum_e w_et``, ``w_et = prod_{k<=t} pi/b(a_ek|s_ek)``.

    All ``(E, T)``: logarithms of the ratios per step, rewards, and which steps count (1 or 0).
    After a termination an episode counts on, with ratio 1 and reward 0, as if it stayed in an
    absorbing state; after a truncation it no longer counts. Consistent, biased for few episodes,
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
        where = f"{behaviour!r} of {log.name}"
        values = log.transitions.get(behaviour, None)
        if not isinstance(values, Tensor):
            held = sorted(map(str, log.transitions.keys(include_nested=True, leaves_only=True)))
            raise ValueError(
                f"the data hold no {behaviour!r}; they hold {held}. Give the key of the logged "
                "actions' log-probabilities, or a behaviour model: an agent of temperature 0."
            )
        if values.numel() != len(log):
            raise ValueError(
                f"{where} has shape {tuple(values.shape)}; wanted one number for each of the "
                f"{len(log)} steps."
            )
        result = values.reshape(-1).double()
    else:
        where = "the behaviour model"
        result = logged_log_prob(resolve_member("behaviour", behaviour), log)
    bad = ~result.isfinite()
    if isinstance(log.action_space, spaces.Discrete):
        bad |= result > 1e-6
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{where} gives log-probability {float(result[row]):g} to the logged action in row "
            f"{row}, and {int(bad.sum())} such in all; wanted finite logarithms, at most 0 for "
            "discrete actions: what was logged cannot have been impossible."
        )
    return result


def _estimate(
    log_ratio: FloatArray, log: OfflineDataset, discount: float, seed: int
) -> tuple[float, float, float, float]:
    """Value, its bounds, and the effective sample size."""
    ratios, rewards, alive = padded(log_ratio, log)
    weight = _weights(ratios, alive)
    powers = _powers(discount, rewards.shape[1])
    low, high = _bootstrap(weight, weight * rewards, powers, seed)
    whole = torch.from_numpy(ratios.sum(axis=1))
    whole = (whole - whole.max()).exp().nan_to_num(0.0)  # -inf less -inf: no episode has weight
    size = float(F.effective_sample_size(whole))
    return pdwis(ratios, rewards, alive, discount), low, high, size


def padded(log_ratio: FloatArray, log: OfflineDataset) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Rows ``(N,)`` as ``(E, T)``: log-ratios, raw rewards, and which steps count; see pdwis."""
    starts, lengths = first_rows(log), log.episode_lengths
    longest = int(lengths.max())
    steps = np.arange(longest)
    inside = steps < lengths[:, None]
    rows = np.where(inside, starts[:, None] + steps, 0)
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


def _bootstrap(
    weight: FloatArray, weighted: FloatArray, powers: FloatArray, seed: int
) -> tuple[float, float]:
    """95 % percentile bounds over resampled episodes; resamples without weight are left out."""
    episodes = len(weight)
    if episodes < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(0, RESAMPLES, 100):
        drawn = generator.multinomial(episodes, np.full(episodes, 1 / episodes), size=100)
        counts = drawn.astype(np.float64)
        totals, numerators = counts @ weight, counts @ weighted
        usable = (totals > 0).all(axis=1)
        values.append((powers * numerators[usable] / totals[usable]).sum(axis=1))
    every = np.concatenate(values)
    if not len(every):
        return float("nan"), float("nan")
    low, high = np.percentile(every, [2.5, 97.5])
    return float(low), float(high)
