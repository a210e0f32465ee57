"""The rows of a ranking: the estimates for each member, before they are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data import OfflineDataset
from iql_torchrl.data.digests import shared_share
from iql_torchrl.selection.bounds import mean_bounds
from iql_torchrl.selection.candidates import Member
from iql_torchrl.selection.coverage import clone_distance
from iql_torchrl.selection.fitted_q import FittedQ
from iql_torchrl.selection.importance_sampling import Importance

__all__ = ["log_value", "member_rows", "trained_share"]


def member_rows(
    members: Sequence[Member],
    held_out: OfflineDataset,
    digests: NDArray[np.int64],
    fitted_q: FittedQ,
    importance: Importance | None,
    *,
    clone: Member | None,
    confidence: float,
    seed: int,
) -> list[dict[str, Any]]:
    """One row per member; ``digests`` ``(E,)`` are those of the held-out episodes."""
    return [
        _identity(member)
        | estimate
        | _weighted(importance, number)
        | _departure(member, clone, fitted_q, number, held_out)
        | {"seen": trained_share(member, digests)}
        for number, (member, estimate) in enumerate(
            zip(members, _estimates(fitted_q, confidence, seed), strict=True)
        )
    ]


def trained_share(member: Member, digests: NDArray[np.int64]) -> float:
    """Share of the episodes ``digests`` that the member was trained on, 0 where unknown."""
    return 0.0 if member.episodes is None else shared_share(member.episodes, digests)


def _identity(member: Member) -> dict[str, Any]:
    temperature = math.nan if member.temperature is None else member.temperature
    return {"rank": 0, "member": member.name, "temperature": temperature}


def _estimates(fitted_q: FittedQ, confidence: float, seed: int) -> list[dict[str, float]]:
    episodes = fitted_q.episodes
    # For the lower bounds, unknown returns count as the smallest for the members and the largest
    # for the log; for the upper bounds the reverse.
    least = episodes.scores - episodes.log_scores_high
    most = episodes.scores_high - episodes.log_scores
    surprise = episodes.surprise + episodes.log_surprise
    bounds = mean_bounds(
        least, least.mean(1) - surprise, most.mean(1) + surprise,
        upper_samples=most, confidence=confidence, seed=seed,
    )  # fmt: skip
    gains = (episodes.scores - episodes.log_scores).mean(1)
    values = fitted_q.intervals(confidence=confidence, seed=seed)
    return [
        {
            "value": float(fitted_q.values[number]),
            "value_low": float(values[number, 0]),
            "value_high": float(values[number, 1]),
            "gain": float(gains[number]),
            "gain_low": float(bounds[0][number]),
            "gain_high": float(bounds[1][number]),
            "td_error": float(fitted_q.td_error[number]),
            "td_error_training": float(fitted_q.td_error_training[number]),
        }
        for number in range(len(gains))
    ]


def log_value(fitted_q: FittedQ, confidence: float, seed: int) -> tuple[float, float, float]:
    scores = fitted_q.episodes.log_scores[None]
    low, high = (np.array([limit]) for limit in fitted_q.episodes.return_range)
    surprise = fitted_q.episodes.log_surprise
    bounds = mean_bounds(
        scores, low - surprise, high + surprise, upper_samples=fitted_q.episodes.log_scores_high[None],
        confidence=confidence, seed=seed,
    )  # fmt: skip
    return float(scores.mean()), float(bounds[0][0]), float(bounds[1][0])


def _weighted(importance: Importance | None, number: int) -> dict[str, float]:
    keys = ("importance_value", "importance_low", "importance_high", "effective_episodes")
    if importance is None:
        return dict.fromkeys(keys, math.nan)
    columns = (importance.values, importance.low, importance.high, importance.effective_sample_size)
    return {key: float(column[number]) for key, column in zip(keys, columns, strict=True)}


def _departure(
    member: Member, clone: Member | None, fitted_q: FittedQ, number: int, log: OfflineDataset
) -> dict[str, float]:
    return {
        "extrapolation": float(fitted_q.episodes.unsupported[number]),
        "worst_extrapolation": float(fitted_q.episodes.worst_unsupported[number]),
        "correcting_episodes": float(fitted_q.episodes.effective_episodes[number]),
        "clone_distance": math.nan if clone is None else clone_distance(member, clone, log),
    }
