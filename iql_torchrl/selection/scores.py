"""The scores of held-out episodes, the common result of all estimators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.episodes import FloatArray, episode_numbers

__all__ = ["EpisodeScores", "effective_episodes"]


@dataclass(frozen=True, repr=False)
class EpisodeScores:
    """Doubly robust scores of E held-out episodes for P members, in raw reward units.

    Attributes:
        scores: ``(P, E)``; their mean estimates the member's value, their spread shows the error.
            Unknown returns, where the log has no data, count as the smallest of ``return_range``.
        log_scores: scores of the policy that made the log, ``(E,)``.
        scores_high, log_scores_high: scores with the largest return in place of unknown ones.
        initial_values: the model's value of each episode's first state, ``(P, E)``.
        surprise: largest distance of one more episode's score from the mean, ``(P,)``: the largest
            weight of a step times the range of returns. log_surprise: that of ``log_scores``, 0
            where no episode was truncated.
        unsupported: for finite states the discounted probability that an episode of the member
            reaches an action that the log lacks in that state; for vectors the share of its steps,
            ``(P,)`` in [0, 1]. log_unsupported: that of the log.
        worst_unsupported: the largest probability of such an action, minus the log's own, in one
            state that the member visits at least once in a hundred episodes (for vectors: the mean
            over the worst 5 % of its steps), ``(P,)``.
        unlogged_ends: discounted weight of truncated ends in states that the log lacks.
        return_range: smallest and largest return from any logged state.
        effective_episodes: effective number of held-out episodes in the correction (Kish), ``(P,)``.
        history: t statistics of the dependence of outcomes on earlier steps, by the name of what
            was tested; empty without a test.
    """

    scores: FloatArray
    log_scores: FloatArray
    scores_high: FloatArray
    log_scores_high: FloatArray
    initial_values: FloatArray
    surprise: FloatArray
    log_surprise: float
    unsupported: FloatArray
    log_unsupported: float
    worst_unsupported: FloatArray
    unlogged_ends: float
    return_range: tuple[float, float]
    effective_episodes: FloatArray
    history: Mapping[str, float]

    def __repr__(self) -> str:
        members, episodes = self.scores.shape
        return f"EpisodeScores({members} members, {episodes} episodes)"


def effective_episodes(weight: FloatArray, log: OfflineDataset) -> float:
    """Kish's effective number of ``log``'s episodes from the weights of its steps ``(N,)``."""
    whole = np.bincount(episode_numbers(log), weight)
    square = float(np.square(whole).sum())
    return float(whole.sum()) ** 2 / square if square > 0 else 0.0
