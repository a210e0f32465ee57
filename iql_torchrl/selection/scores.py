"""What an estimator says of each held-out episode, whichever estimator it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.episodes import FloatArray, episode_numbers

__all__ = ["EpisodeScores", "effective_episodes"]


@dataclass(frozen=True)
class EpisodeScores:
    """Doubly robust scores of E held-out episodes for P members, in raw reward units.

    Attributes:
        scores: ``(P, E)``; their mean estimates the member's value, their spread shows the error.
            Where the log says nothing of what follows, the least return in ``return_range`` does.
        log_scores: the same of the policy that made the log, ``(E,)``.
        scores_high, log_scores_high: the same with the greatest return where nothing is known.
        initial_values: the model's own value of each episode's first state, ``(P, E)``.
        surprise: how far one more episode's score could lie from the mean, ``(P,)``: one step of the
            greatest weight that leads to the least return instead of the greatest.
            log_surprise: the same of ``log_scores``, 0 where no episode was truncated.
        unsupported: for finite states the discounted probability that an episode of the member
            comes to an action that the log lacks there; for vectors the share of its steps,
            ``(P,)`` in [0, 1]. log_unsupported: the same of the log.
        worst_unsupported: the greatest probability of such an action, less the log's own, in one
            state that the member visits at least once in a hundred episodes (for vectors: the mean
            over the worst twentieth of its steps), ``(P,)``.
        unlogged_ends: discounted weight of truncated ends that no logged state describes.
        return_range: least and greatest return that any logged state was seen to lead to.
        effective_episodes: on how many held-out episodes the correction rests (Kish), ``(P,)``.
        history: what earlier than the observation outcomes were tried to depend on, and how
            strongly they do, as t statistics; empty where it was not tried.
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


def effective_episodes(weight: FloatArray, log: OfflineDataset) -> float:
    """Kish's effective number of ``log``'s episodes from the weights of its steps ``(N,)``."""
    whole = np.bincount(episode_numbers(log), weight)
    square = float(np.square(whole).sum())
    return float(whole.sum()) ** 2 / square if square > 0 else 0.0
