"""A log as arrays of its rows and episodes, and the scores that estimators give its episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.descriptions import describe_space
from iql_torchrl.selection.bounds import FloatArray, mean_bounds


class Episodes:
    """A log of N rows and E episodes as arrays.

    Attributes:
        log: the dataset.
        lengths, first, last: of each episode the number of rows, the first and the last row ``(E,)``.
        number: of the episode of each row, counted from 0 ``(N,)``.
        reward: of each row, before the dataset's ``reward_map``, float64 ``(N,)``.
        terminated: which rows terminated ``(N,)``; in some logs the episode continues afterwards.
        never_terminated: which episodes never terminate ``(E,)``.
    """

    def __init__(self, log: OfflineDataset) -> None:
        self.log, self.lengths = log, np.asarray(log.episode_lengths)
        self.last = np.cumsum(self.lengths) - 1
        self.first = self.last - self.lengths + 1
        self.number = np.repeat(np.arange(len(self)), self.lengths)
        after = log.transitions["next"]
        mapped = after["reward"].reshape(-1).double().cpu().numpy()
        self.reward: FloatArray = np.asarray(log.reward_map.inverse(mapped), np.float64)
        self.terminated = after["terminated"].reshape(-1).cpu().numpy()
        self.never_terminated = ~np.logical_or.reduceat(self.terminated, self.first)

    def __len__(self) -> int:
        return len(self.lengths)

    def sums(self, values: FloatArray) -> FloatArray:
        """The sum of ``values`` ``(N,)`` over each episode, ``(E,)``."""
        return np.asarray(np.bincount(self.number, values, len(self)), np.float64)

    def effective(self, weight: FloatArray) -> float:
        """Kish's effective number of episodes from the weights of the rows ``(N,)``."""
        return float(F.effective_sample_size(torch.from_numpy(self.sums(weight))))

    def truncation_weight(self, discount: float) -> FloatArray:
        """``discount**T`` of episodes of T rows that never terminate, 0 of others, ``(E,)``."""
        return np.asarray(float(discount) ** self.lengths * self.never_terminated)

    def horizon(self, discount: float) -> float:
        """How many steps a value adds up: the mean of ``sum_t discount**t`` over the episodes."""
        step = np.arange(len(self.number)) - self.first[self.number]
        return float((float(discount) ** step).sum()) / len(self)

    def returns_to_go(self, discount: float) -> FloatArray:
        """``sum_k discount**k r_{t+k}`` to the next termination, ``(N,)``.

        Without one, to the episode's last row; rewards after a truncation are not estimated.
        """
        result, going = self.reward.copy(), discount * ~self.terminated
        for step in range(int(self.lengths.max()) - 2, -1, -1):
            rows = self.first[self.lengths > step + 1] + step
            result[rows] += going[rows] * result[rows + 1]
        return result


def read_datasets(
    train: OfflineDataset, held_out: OfflineDataset, discount: float
) -> tuple[Episodes, Episodes]:
    """Both as arrays; ``ValueError`` unless they are of one task and ``discount`` is in [0, 1]."""
    if isinstance(discount, bool) or not 0 <= discount <= 1:
        raise ValueError(f"discount is {discount!r}; it must lie in [0, 1].")
    for name in ("observation_space", "action_space"):
        one, other = getattr(train, name), getattr(held_out, name)
        if one != other:
            raise ValueError(
                f"{name} of train is {describe_space(one)} and of held_out {describe_space(other)}; "
                "expected two parts of one log: dataset.split(fraction, seed) gives them."
            )
    space = train.action_space
    vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    if not vector and not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"the actions are {describe_space(space)}; expected Discrete, or a Box of shape (A,)."
        )
    return Episodes(train), Episodes(held_out)


def return_range(discount: float, *logs: Episodes) -> tuple[float, float]:
    """Smallest and largest return from any logged state.

    The minimum and maximum over returns-to-go of episodes that terminated, and over the returns of
    truncated episodes. The latter are divided by ``1 - discount**T``, as if they were repeated
    without end.
    """
    every = []
    for log in logs:
        returns = log.returns_to_go(discount)
        every.append(returns[log.first] / np.maximum(1 - log.truncation_weight(discount), 1e-12))
        every.append(returns[~log.never_terminated[log.number]])
    joined = np.concatenate(every)
    return float(joined.min()), float(joined.max())


@dataclass(frozen=True, repr=False)
class EpisodeScores:
    """Doubly robust scores of E held-out episodes for P candidates, in raw reward units.

    Attributes:
        scores: ``(P, E)``; their mean estimates the candidate's value, their spread shows the error.
            Unknown returns, where the log has no data, count as the smallest of ``return_range``.
        behaviour_scores: scores of the policy that made the log, ``(E,)``.
        scores_high, behaviour_scores_high: scores with the largest return in place of unknown ones.
        initial_values: the model's value of each episode's first state, ``(P, E)``.
        max_score_deviation: largest distance of one more episode's score from the mean,
            ``(P,)``: the largest weight of a step times the range of returns.
        behaviour_max_deviation: that of ``behaviour_scores``, 0 where no episode was truncated.
        unsupported: for finite states the discounted probability that an episode of the candidate
            reaches an action that the log lacks in that state; for vectors the share of its steps,
            ``(P,)`` in [0, 1]. behaviour_unsupported: that of the log.
        worst_unsupported: the largest probability of such an action, minus the log's own, in one
            state that the candidate visits at least once in a hundred episodes (for vectors: the mean
            over the worst 5 % of its steps), ``(P,)``.
        uncovered_ends: discounted weight of truncated ends in states that the log lacks.
        return_range: smallest and largest return from any logged state.
        effective_episodes: effective number of held-out episodes in the correction (Kish), ``(P,)``.
        history: t statistics of the dependence of outcomes on earlier steps, by the name of what
            was tested; empty without a test.
    """

    scores: FloatArray
    behaviour_scores: FloatArray
    scores_high: FloatArray
    behaviour_scores_high: FloatArray
    initial_values: FloatArray
    max_score_deviation: FloatArray
    behaviour_max_deviation: float
    unsupported: FloatArray
    behaviour_unsupported: float
    worst_unsupported: FloatArray
    uncovered_ends: float
    return_range: tuple[float, float]
    effective_episodes: FloatArray
    history: Mapping[str, float]

    def __repr__(self) -> str:
        candidates, episodes = self.scores.shape
        return f"EpisodeScores({candidates} candidates, {episodes} episodes)"

    def value_bounds(self, confidence: float, seed: int) -> tuple[FloatArray, FloatArray]:
        """Bounds of each candidate's value by itself, ``(P,)``; see :func:`bounds.mean_bounds`."""
        return _score_bounds(
            self.scores, self.scores_high, self.max_score_deviation,
            together=False, confidence=confidence, seed=seed,
        )  # fmt: skip

    def gain_bounds(self, confidence: float, seed: int) -> tuple[FloatArray, FloatArray]:
        """Bounds ``(P,)`` of the candidates' gains over the log that hold for all at once.

        Unknown returns count as the smallest for the candidates and the largest for the log in the
        lower bounds, and the reverse in the upper bounds.
        """
        return _score_bounds(
            self.scores - self.behaviour_scores_high, self.scores_high - self.behaviour_scores,
            self.max_score_deviation + self.behaviour_max_deviation, confidence=confidence, seed=seed,
        )  # fmt: skip

    def behaviour_value(self, confidence: float, seed: int) -> tuple[float, float, float]:
        """Value of the policy that made the log, and its bounds."""
        low, high = self.return_range
        bounds = mean_bounds(
            self.behaviour_scores[None], np.array([low - self.behaviour_max_deviation]),
            np.array([high + self.behaviour_max_deviation]),
            upper_samples=self.behaviour_scores_high[None], confidence=confidence, seed=seed,
        )  # fmt: skip
        return float(self.behaviour_scores.mean()), float(bounds[0][0]), float(bounds[1][0])


def _score_bounds(
    least: FloatArray, most: FloatArray, max_score_deviation: FloatArray, **options: bool | float
) -> tuple[FloatArray, FloatArray]:
    lowest, highest = least.mean(1) - max_score_deviation, most.mean(1) + max_score_deviation
    return mean_bounds(least, lowest, highest, upper_samples=most, **options)  # type: ignore[arg-type]
