"""A ranking of trained policies from logs alone, and a recommendation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from iql_torchrl.data import OfflineDataset
from iql_torchrl.data.digests import episode_digests, shared_share, sketch_of
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.selection.candidates import Member, has_density, resolve_members
from iql_torchrl.selection.caveats import (
    BLOCKING,
    doubts_of,
    general_warnings,
    member_warnings,
    value_warnings,
)
from iql_torchrl.selection.episodes import LOG_PROB, check_logs, raw_rewards
from iql_torchrl.selection.fitted_q import FittedQ, fitted_q_evaluation
from iql_torchrl.selection.importance_sampling import Importance, importance_sampling
from iql_torchrl.selection.member_rows import (
    log_value,
    member_rows,
    trained_share,
)
from iql_torchrl.selection.ranking import Ranking

__all__ = ["rank_members"]


MIN_COMPARED = 3


def rank_members(
    members: Mapping[str, Any],
    train: OfflineDataset,
    held_out: OfflineDataset,
    *,
    discount: float,
    fitted_q: FittedQ | None = None,
    behaviour: Any = None,
    clone: str | None = None,
    deterministic: bool | None = None,
    min_count: int = 2,
    max_extrapolation: float = 0.05,
    min_effective_episodes: float = 100.0,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Ranking:
    """Members by estimated value, with doubts about each estimate, and a recommendation.

    A member's ``value`` is the mean of its doubly robust scores over the held-out episodes: fitted
    Q evaluation on ``train``, corrected by held-out steps
    (:class:`~iql_torchrl.selection.scores.EpisodeScores`). The log's value is that of the policy
    that made it, from the same episodes; it needs no clone. ``gain`` is the mean over episodes of
    their difference. Its bounds hold for all members at once with probability ``confidence``, so
    they remain valid for the best of many. They include the error of the estimate, as far as
    held-out episodes show it, and one more episode with the worst return in the log
    (:func:`bounds.mean_bounds`).

    The recommended member has the largest value among those whose interval of the gain is above
    zero and that have no doubts except ``importance`` and ``td_error``. No member is recommended
    where networks have not converged, where ``train`` and ``held_out`` share episodes, where
    outcomes depend on more than the observation (for a table, see ``table.table_scores``), or where
    for any member fitted Q evaluation and importance sampling contradict each other beyond their
    intervals.

    Assumptions: episodes are independent of each other, no return is worse than the worst one from
    any logged state, and members were chosen without ``held_out``. With networks also: the critics'
    features describe values and visits well enough.

    A log cannot show the effect of an action that it lacks in a state, nor the effect of causes that
    the log's policy used but the observations do not contain. Up to ``max_extrapolation``, missing
    actions count with the smallest logged return; above it, the member is not recommended.

    Args:
        members: name to ``Agent`` or TorchRL actor.
        train, held_out: see :func:`fitted_q_evaluation`; without episodes that members trained on.
        discount: in [0, 1].
        fitted_q: an evaluation of the same members on ``held_out``; by default made here with
            ``fitted_q_evaluation``'s defaults.
        behaviour: for importance sampling; a key of the data or a model, see
            :func:`importance_sampling`. None: ``"action_log_prob"`` where the data have it,
            otherwise no importance sampling.
        clone: the member that imitates the log; by default the first of temperature 0. Distances
            are measured from it; nothing else depends on it.
        deterministic: whether both estimators evaluate the most probable or deterministic action, or
            the policy as it samples; not used with ``fitted_q``, which has its own. None: as it
            samples for discrete actions, and for continuous ones where there is importance sampling,
            because a deterministic continuous action has no density. Where some member has none, or
            ``deterministic`` is True for continuous actions, there is no importance sampling, and a
            warning says so.
        min_count: see :func:`fitted_q_evaluation`; not used with ``fitted_q``.
        max_extrapolation: the largest share of unsupported actions, minus that of the log itself,
            see ``EpisodeScores.unsupported``; in [0, 1].
        min_effective_episodes: effective sample size below which importance sampling is doubted;
            it is also doubted below a tenth of the held-out episodes.
        confidence: of the intervals, in (0, 1).
        seed: of every random choice.
        progress: see :func:`fitted_q_evaluation`; not used with ``fitted_q``.

    Raises:
        TypeError, ValueError: as ``fitted_q_evaluation`` and ``importance_sampling``; ``clone`` is
            not a member; ``fitted_q`` is of other members, episodes or another discount; a number
            out of range.
    """
    resolved = resolve_members(members)
    check_logs(train, held_out, discount)
    _check_shares(max_extrapolation=max_extrapolation, confidence=confidence)
    imitator = _clone(resolved, clone)
    if behaviour is None and LOG_PROB in held_out.transitions:
        behaviour = LOG_PROB
    continuous = not isinstance(held_out.action_space, spaces.Discrete)
    chosen = deterministic if fitted_q is None else fitted_q.deterministic
    unchecked = _unchecked(resolved, held_out, behaviour, continuous and bool(chosen))
    if fitted_q is None:
        if chosen is None and continuous:
            chosen = bool(unchecked)
        fitted_q = fitted_q_evaluation(
            members, train, held_out, discount=discount, min_count=min_count, seed=seed,
            deterministic=chosen, progress=progress,
        )  # fmt: skip
    _check_fitted(fitted_q, resolved, held_out, discount)
    importance = None
    if not unchecked:
        importance = _importance(members, held_out, behaviour, fitted_q, confidence, seed)
    digests, fit_digests = episode_digests(held_out), episode_digests(train)
    rows = member_rows(
        resolved, held_out, digests, fitted_q, importance,
        clone=imitator, confidence=confidence, seed=seed,
    )  # fmt: skip
    episodes = fitted_q.episodes
    shown: dict[str, Any] = {
        "episodes": len(digests),
        "log_extrapolation": episodes.log_unsupported,
        "possible": _possible_values(fitted_q, train, held_out),
    }
    _rank(rows, shown, max_extrapolation, min_effective_episodes)
    agreement = _agreement(rows)
    log = log_value(fitted_q, confidence, seed)
    shared = shared_share(sketch_of(fit_digests), digests)
    blocking = value_warnings(
        fitted_q.backups, fitted_q.passes, held_out, discount, shared, episodes.history
    )
    general = general_warnings(
        rows, unchecked=unchecked, sampled=continuous and not fitted_q.deterministic,
        agreement=agreement[0],
        clone=imitator.name if imitator else None, log=log, unlogged=episodes.unlogged_ends,
        fit_seen=max(trained_share(member, fit_digests) for member in resolved),
    )  # fmt: skip
    recommended, sentence = _recommendation(rows, bool(blocking), confidence)
    warnings = (*member_warnings(rows, **shown), *blocking, *general)
    return Ranking(
        tuple(rows), *log, episodes.log_unsupported, *agreement, recommended, sentence, warnings,
        discount, len(digests),
    )  # fmt: skip


def _possible_values(
    fitted_q: FittedQ, train: OfflineDataset, held_out: OfflineDataset
) -> tuple[float, float]:
    """Smallest and largest possible value.

    For networks the range of logged returns. A table may combine parts of different episodes, so
    there the range is that of the smallest and the largest logged reward at every step.
    """
    low, high = fitted_q.episodes.return_range
    if math.isfinite(fitted_q.backups):
        return low, high
    rewards = np.concatenate([raw_rewards(train), raw_rewards(held_out)])
    longest = max(int(log.episode_lengths.max()) for log in (train, held_out))
    steps = longest if fitted_q.discount == 1 else 1 / (1 - fitted_q.discount)
    return min(low, steps * float(rewards.min())), max(high, steps * float(rewards.max()))


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if (
            isinstance(value, bool)
            or not 0 <= value <= 1
            or (name == "confidence" and value in (0, 1))
        ):
            raise ValueError(f"{name} is {value!r}; it must lie between 0 and 1.")


def _clone(members: Sequence[Member], name: str | None) -> Member | None:
    names = [member.name for member in members]
    if name is None:
        return next((member for member in members if member.temperature == 0), None)
    if name not in names:
        raise ValueError(f"clone is {name!r}, which is none of the members {names}.")
    return members[names.index(name)]


def _check_fitted(
    fitted_q: FittedQ, members: Sequence[Member], held_out: OfflineDataset, discount: float
) -> None:
    names, episodes = tuple(member.name for member in members), len(held_out.episode_lengths)
    actual = (fitted_q.names, fitted_q.episodes.scores.shape[1], fitted_q.discount)
    expected = (names, episodes, discount)
    if actual != expected:
        raise ValueError(
            f"fitted_q has (members, episodes, discount) {actual}, expected {expected}: "
            "pass what fitted_q_evaluation returned for the same arguments."
        )


def _unchecked(
    members: Sequence[Member], log: OfflineDataset, behaviour: Any, deterministic: bool
) -> str:
    """Why the same policies cannot be evaluated by importance sampling; empty where they can.

    ``deterministic``: whether fitted Q evaluation takes deterministic continuous actions.
    """
    if behaviour is None:
        return "the data hold no behaviour log-probabilities and no behaviour model was given"
    if deterministic:
        return (
            "importance sampling is left out, because values are of deterministic continuous actions, "
            "which have no density (deterministic=False evaluates the policies as they sample)"
        )
    if isinstance(log.action_space, spaces.Discrete):
        return ""
    without = [member.name for member in members if not has_density(member, log.transitions)]
    if without:
        return (
            f"importance sampling is left out, because {', '.join(without)} "
            f"{'have' if len(without) > 1 else 'has'} no density of actions"
        )
    return ""


def _importance(
    members: Mapping[str, Any],
    log: OfflineDataset,
    behaviour: Any,
    fitted_q: FittedQ,
    confidence: float,
    seed: int,
) -> Importance:
    """Intervals that hold for all members at once (Bonferroni), in the range of logged returns."""
    return importance_sampling(
        members,
        log,
        behaviour=behaviour,
        discount=fitted_q.discount,
        deterministic=fitted_q.deterministic,
        confidence=1 - (1 - confidence) / len(members),
        return_limits=fitted_q.episodes.return_range,
        seed=seed,
    )


def _rank(
    rows: list[dict[str, Any]],
    shown: Mapping[str, Any],
    max_extrapolation: float,
    min_effective_episodes: float,
) -> None:
    """Sort by value, and add ranks and doubts."""
    rows.sort(key=lambda row: float(-row["value"]))
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
        row["doubts"] = doubts_of(
            row,
            max_extrapolation=max_extrapolation,
            min_effective_episodes=min_effective_episodes,
            **shown,
        )


def _agreement(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Spearman's and Kendall's correlation over the members whose importance weights are not doubted.

    NaN for fewer than ``MIN_COMPARED`` of them, for unknown (NaN) values, or where all are equal.
    """
    sound = [row for row in rows if "importance" not in row["doubts"]]
    if len(sound) < MIN_COMPARED:
        return math.nan, math.nan
    values, checks = ([row[key] for row in sound] for key in ("value", "importance_value"))
    return rank_correlations(values, checks)


def _recommendation(
    rows: Sequence[Mapping[str, Any]], blocked: bool, confidence: float
) -> tuple[str | None, str]:
    """The recommended member of ``rows``, best first, and a sentence about it.

    ``blocked``: no value may be compared with the log's.
    """
    better = [row for row in rows if row["gain_low"] > 0]
    sound = [row for row in better if not set(row["doubts"]) & set(BLOCKING)]
    contradicted = any("contradiction" in row["doubts"] for row in rows)
    of_all = f"{confidence:.0%} interval for all {len(rows)} members at once"
    if blocked or contradicted or not sound:
        best = rows[0]
        doubted = "; better estimates are doubted, see the warnings" if better else ""
        return None, (
            "Recommendation: no member is reliably better than the log (the best, "
            f"{best['member']}, gains {best['gain']:.4g}, {of_all} {best['gain_low']:.4g} to "
            f"{best['gain_high']:.4g}{doubted})."
        )
    chosen = sound[0]
    higher = chosen["rank"] - 1
    more = f"; {higher} with higher estimates are doubted or uncertain" if higher else ""
    return chosen["member"], (
        f"Recommendation: {chosen['member']}, with an estimated gain over the log of "
        f"{chosen['gain']:.4g} ({of_all} {chosen['gain_low']:.4g} to {chosen['gain_high']:.4g}{more})."
    )
