"""Which of several trained policies to ship when none may be tried: a ranking from logs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.correlation import kendall, spearman
from iql_torchrl.data import OfflineDataset
from iql_torchrl.doubts import (
    doubts_of,
    general_warnings,
    is_off,
    member_warnings,
    value_warnings,
)
from iql_torchrl.fqe import FittedQ, fitted_q_evaluation
from iql_torchrl.importance import Importance, importance_sampling
from iql_torchrl.members import Member, check_logs, first_rows, resolve_members, returns_to_go
from iql_torchrl.ranking import Ranking
from iql_torchrl.results import bootstrap_interval
from iql_torchrl.support import Support, clone_distance

__all__ = ["Ranking", "rank_members"]

FloatArray = NDArray[np.float64]

LOG_PROB = "action_log_prob"
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
    min_count: int = 5,
    min_probability: float = 0.02,
    max_extrapolation: float = 0.2,
    min_effective_episodes: float = 100.0,
    seed: int = 0,
) -> Ranking:
    """Members by estimated value, with what speaks against each estimate, and whom to ship.

    The value is that of fitted Q evaluation at the held-out episodes' first states. The log's own
    is the mean discounted return of the same episodes; where one was truncated and there is a
    clone, ``discount**T`` times the clone's value of its last state is added, for what the log's
    policy would have gone on to earn. ``gain`` is the mean over episodes of their difference, its
    bounds a 95 % bootstrap over held-out episodes, paired: both sides of an episode are drawn
    together. Recommended is the best member whose interval lies above zero and of which nothing but
    importance sampling is doubted; none, where the values as a whole cannot be compared with the
    log's. The interval holds no error of the critics themselves and no correction for choosing the
    best of many: that is what the doubts and a modest number of members are for. An estimate knows
    nothing of states that the log does not hold: where policies wander off far from a narrow log,
    it is too high.

    Args:
        members: name to ``Agent`` or TorchRL actor.
        train, held_out: see :func:`fitted_q_evaluation`; best neither holds the members' own data.
        discount: in [0, 1].
        fitted_q: an evaluation of the same members on ``held_out``; by default made here with
            ``fitted_q_evaluation``'s defaults.
        behaviour: for importance sampling; a key of the data or a model, see
            :func:`importance_sampling`. None: ``"action_log_prob"`` where the data have it, else
            importance sampling is left out.
        clone: the member that imitates the log; by default the first of temperature 0.
        min_count, min_probability: what counts as unseen in the log, see :class:`Support`.
        max_extrapolation: share of steps outside the log above which a member is warned of.
        min_effective_episodes: effective sample size below which importance sampling is; so it is
            below a tenth of the held-out episodes.
        seed: of every random choice.

    Raises:
        TypeError, ValueError: as ``fitted_q_evaluation`` and ``importance_sampling``; ``clone`` is
            no member; ``fitted_q`` is of other members, episodes or another discount.
    """
    resolved = resolve_members(members)
    check_logs(train, held_out, discount)
    imitator = _clone(resolved, clone)
    if fitted_q is None:
        fitted_q = fitted_q_evaluation(members, train, held_out, discount=discount, seed=seed)
    _check_fitted(fitted_q, resolved, held_out, discount)
    importance = _importance(members, held_out, behaviour, discount, seed)
    support = Support(
        train, held_out, clone=imitator, min_count=min_count, min_probability=min_probability,
        seed=seed,
    )  # fmt: skip
    returns = returns_to_go(held_out, discount)[first_rows(held_out)]
    if imitator is not None:
        returns = returns + fitted_q.end_values[resolved.index(imitator)]
    rows = [
        _identity(member)
        | _estimated(fitted_q, number, returns, seed)
        | _weighted(importance, number)
        | _departure(member, imitator, support, held_out)
        for number, member in enumerate(resolved)
    ]
    _rank(rows, returns, max_extrapolation, min_effective_episodes)
    agreement = _agreement(rows)
    log = float(returns.mean()), *bootstrap_interval(returns, seed=seed)
    imitation = next((r for r in rows if imitator and r["member"] == imitator.name), None)
    doubtful = value_warnings(
        fitted_q.backups, fitted_q.passes, held_out, discount, with_clone=imitator is not None
    )
    warnings = (
        *member_warnings(rows, returns, support.usual),
        *doubtful,
        *general_warnings(importance, agreement[0], imitation, log),
    )
    off = imitation is not None and is_off(imitation, log)
    recommended, sentence = _recommendation(rows, bool(doubtful), off)
    return Ranking(
        tuple(rows), *log, support.usual, *agreement, recommended, sentence, warnings, discount,
        len(returns),
    )  # fmt: skip


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
    found = (fitted_q.names, fitted_q.initial_values.shape[1], fitted_q.discount)
    wanted = (names, episodes, discount)
    if found != wanted:
        raise ValueError(
            f"fitted_q has (members, episodes, discount) {found}, wanted {wanted}: "
            "pass what fitted_q_evaluation gave for the same arguments."
        )


def _importance(
    members: Mapping[str, Any], log: OfflineDataset, behaviour: Any, discount: float, seed: int
) -> Importance | None:
    if behaviour is None and LOG_PROB in log.transitions:
        behaviour = LOG_PROB
    if behaviour is None:
        return None
    return importance_sampling(members, log, behaviour=behaviour, discount=discount, seed=seed)


def _identity(member: Member) -> dict[str, Any]:
    temperature = math.nan if member.temperature is None else member.temperature
    return {"rank": 0, "member": member.name, "temperature": temperature}


def _estimated(fitted_q: FittedQ, number: int, returns: FloatArray, seed: int) -> dict[str, float]:
    values = fitted_q.initial_values[number]
    low, high = bootstrap_interval(values, seed=seed)
    gain_low, gain_high = bootstrap_interval(values - returns, seed=seed)
    return {
        "value": float(values.mean()),
        "value_low": low,
        "value_high": high,
        "gain": float((values - returns).mean()),
        "gain_low": gain_low,
        "gain_high": gain_high,
        "td_error": float(fitted_q.td_error[number]),
        "td_error_training": float(fitted_q.td_error_training[number]),
        "optimism": float(fitted_q.optimism[number]),
        "optimism_error": float(fitted_q.optimism_error[number]),
    }


def _weighted(importance: Importance | None, number: int) -> dict[str, float]:
    keys = ("importance_value", "importance_low", "importance_high", "effective_episodes")
    if importance is None:
        return dict.fromkeys(keys, math.nan)
    columns = (importance.values, importance.low, importance.high, importance.effective_sample_size)
    return {key: float(column[number]) for key, column in zip(keys, columns, strict=True)}


def _departure(
    member: Member, clone: Member | None, support: Support, log: OfflineDataset
) -> dict[str, float]:
    distance = math.nan if clone is None else clone_distance(member, clone, log)
    return {"extrapolation": support.share(member), "clone_distance": distance}


def _rank(rows: list[dict[str, Any]], returns: FloatArray, *limits: float) -> None:
    """Order by value, and note ranks and doubts."""
    rows.sort(key=lambda row: float(-row["value"]))
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
        row["doubts"] = doubts_of(row, returns, *limits)


def _agreement(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Spearman's and Kendall's, over the members whose importance weights are not doubted."""
    sound = [row for row in rows if "importance" not in row["doubts"]]
    if len(sound) < MIN_COMPARED:
        return math.nan, math.nan
    values, checks = ([row[key] for row in sound] for key in ("value", "importance_value"))
    return spearman(values, checks), kendall(values, checks)


def _recommendation(
    rows: Sequence[Mapping[str, Any]], blocked: bool, off: bool
) -> tuple[str | None, str]:
    """Whom to ship of ``rows``, best first, and the sentence that says so.

    The best of those that gain and that nothing but importance sampling is doubted of. ``blocked``:
    no value may be compared with the log's; ``off``: the clone's estimate is not what it earned.
    """
    better = [row for row in rows if row["gain_low"] > 0]
    sound = [row for row in better if set(row["doubts"]) <= {"importance"}]
    if blocked or not sound:
        best = rows[0]
        doubted = "" if not better else "; what looks better is doubted, see the warnings"
        return None, (
            "Recommendation: no member is reliably better than the log (the best, "
            f"{best['member']}, gains {best['gain']:.4g}, 95 % interval {best['gain_low']:.4g} to "
            f"{best['gain_high']:.4g}{doubted})."
        )
    chosen = sound[0]
    higher = chosen["rank"] - 1
    more = f"; {higher} with higher estimates are doubted" if higher else ""
    return chosen["member"], (
        f"Recommendation: {chosen['member']}, with an estimated gain over the log of "
        f"{chosen['gain']:.4g} (95 % interval {chosen['gain_low']:.4g} to "
        f"{chosen['gain_high']:.4g}{more})" + ("; but first read the warnings." if off else ".")
    )
