"""A dataset as arrays of its transitions and episodes, and scores of its episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.descriptions import describe_space
from iql_torchrl.selection.bounds import FloatArray, mean_bounds


class Episodes:
    """N transitions of a dataset as arrays of E episodes, with the discount of their values.

    Attributes:
        lengths, first, last: number of transitions, first and last one of each episode ``(E,)``.
        number, step: the episode of each transition, and its place in the episode, from 0 ``(N,)``.
        reward: before reward scaling, float64 ``(N,)``.
        terminated: ``(N,)``; in some datasets the episode continues afterwards.
        never_terminated: ``(E,)``.
        truncation_weight: ``discount**T`` of episodes of T steps that never terminate, else 0.
        horizon: mean of ``sum_t discount**t`` over the episodes: how many steps a value adds up.
        continuous: True for continuous actions.
    """

    def __init__(self, dataset: OfflineDataset, discount: float) -> None:
        self.dataset, self.discount = dataset, float(discount)
        self.lengths = np.asarray(dataset.episode_lengths)
        self.last = np.cumsum(self.lengths) - 1
        self.first = self.last - self.lengths + 1
        self.number = np.repeat(np.arange(len(self)), self.lengths)
        self.step = np.arange(len(self.number)) - self.first[self.number]
        after = dataset.transitions["next"]
        scaled = after["reward"].reshape(-1).double().cpu().numpy()
        self.reward: FloatArray = np.asarray(dataset.reward_map.inverse(scaled), np.float64)
        self.terminated = after["terminated"].reshape(-1).cpu().numpy()
        self.never_terminated = ~np.logical_or.reduceat(self.terminated, self.first)
        self.truncation_weight = self.discount**self.lengths * self.never_terminated
        self.horizon = float((self.discount**self.step).sum()) / len(self)
        self.continuous = not isinstance(dataset.action_space, spaces.Discrete)

    def __len__(self) -> int:
        return len(self.lengths)

    def sums(self, values: FloatArray) -> FloatArray:
        """The sum of ``values`` ``(N,)`` over each episode, ``(E,)``."""
        return np.asarray(np.bincount(self.number, values, len(self)), np.float64)

    def effective(self, weight: FloatArray) -> float:
        """Kish's effective number of episodes from the weights of the transitions ``(N,)``."""
        return float(F.effective_sample_size(torch.from_numpy(self.sums(weight))))

    @cached_property
    def returns_to_go(self) -> FloatArray:
        """``sum_k discount**k r_{t+k}`` to the next termination, ``(N,)``.

        Without one, to the episode's last transition; later rewards are not estimated.
        """
        result, going = self.reward.copy(), self.discount * ~self.terminated
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
                "expected two parts of one dataset: dataset.split(fraction, seed) gives them."
            )
    space = train.action_space
    vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    if not vector and not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"the actions are {describe_space(space)}; expected Discrete, or a Box of shape (A,)."
        )
    return Episodes(train, discount), Episodes(held_out, discount)


def check_all_terminate(**parts: Episodes) -> None:
    """Raise ``ValueError`` where undiscounted values have no bound; ``parts``: by argument's name."""
    for name, part in parts.items():
        if cut := int(part.never_terminated.sum()):
            raise ValueError(
                f"discount is 1 and {cut} of {len(part)} episodes of {name} end without termination, "
                "past which undiscounted values have no bound; choose a discount below 1."
            )


def return_range(*parts: Episodes) -> tuple[float, float]:
    """Smallest and largest return from any logged state.

    Over returns-to-go of episodes that terminated, and over returns of truncated episodes divided by
    ``1 - discount**T``, as if they were repeated without end.
    """
    every = []
    for part in parts:
        returns = part.returns_to_go
        every.append(returns[part.first] / np.maximum(1 - part.truncation_weight, 1e-12))
        every.append(returns[~part.never_terminated[part.number]])
    joined = np.concatenate(every)
    return float(joined.min()), float(joined.max())


@dataclass(frozen=True, kw_only=True, repr=False)
class EpisodeScores:
    """Doubly robust scores of E held-out episodes for P candidates, in raw reward units.

    Attributes:
        scores: ``(P, E)``; their mean estimates the candidate's value, their spread shows the error.
            Unknown returns, where the dataset has no data, count as the smallest of ``return_range``.
        behaviour_scores: of the behaviour policy, ``(E,)``.
        scores_high, behaviour_scores_high: with the largest return in place of unknown ones.
        initial_values: the model's value of each episode's first state, ``(P, E)``.
        max_score_deviation: largest distances of one more episode's score below and above the mean,
            ``(P, 2)``; see :func:`estimators.candidate_scores`.
        behaviour_max_deviation: that of ``behaviour_scores``, 0 where no episode was truncated.
        unsupported: for finite states the discounted probability that an episode of the candidate
            reaches an action that the dataset lacks in that state; for vectors the share of its steps,
            ``(P,)`` in [0, 1]. behaviour_unsupported: that of the behaviour policy.
        worst_unsupported: the largest probability of such an action, minus the behaviour policy's, in
            one state that the candidate visits at least once in a hundred episodes (for vectors: the
            mean over the worst 5 % of its steps), ``(P,)``.
        uncovered_ends: discounted weight of truncated ends in states that the dataset lacks.
        return_range: smallest and largest return from any logged state.
        effective_episodes: effective number of held-out episodes in the correction (Kish), ``(P,)``.
        exact: where scores have exact weights from known propensities, ``(P,)``.
        history: t statistics of the dependence of outcomes on earlier steps, by the name of what
            was tested; empty without a test.
    """

    scores: FloatArray
    scores_high: FloatArray
    max_score_deviation: FloatArray
    effective_episodes: FloatArray
    behaviour_scores: FloatArray
    behaviour_scores_high: FloatArray
    behaviour_max_deviation: float
    initial_values: FloatArray
    unsupported: FloatArray
    behaviour_unsupported: float
    worst_unsupported: FloatArray
    uncovered_ends: float
    return_range: tuple[float, float]
    exact: NDArray[np.bool_]
    history: Mapping[str, float]

    def __repr__(self) -> str:
        candidates, episodes = self.scores.shape
        return f"EpisodeScores({candidates} candidates, {episodes} episodes)"

    def value_bounds(self, confidence: float, seed: int) -> tuple[FloatArray, FloatArray]:
        """Bounds of each candidate's value by itself, ``(P,)``; see :func:`bounds.mean_bounds`.

        Those from exact weights are clipped to ``return_range``.
        """
        bounds = _score_bounds(
            self.scores, self.scores_high, self.max_score_deviation,
            together=False, confidence=confidence, seed=seed,
        )  # fmt: skip
        low, high = np.where(self.exact, np.clip(bounds, *self.return_range), bounds)
        return low, high

    def gain_bounds(self, confidence: float, seed: int) -> tuple[FloatArray, FloatArray]:
        """Bounds ``(P,)`` of the gains over the behaviour policy that hold for all at once.

        Unknown returns count as the smallest for the candidates and the largest for the behaviour
        policy in the lower bounds, and the reverse in the upper bounds.
        """
        deviation = self.max_score_deviation + self.behaviour_max_deviation
        # one more episode may have weight 0 and any return of the behaviour policy
        span = self.return_range[1] - self.return_range[0]
        deviation[self.exact] = np.maximum(deviation[self.exact], span)
        return _score_bounds(
            self.scores - self.behaviour_scores_high, self.scores_high - self.behaviour_scores,
            deviation, confidence=confidence, seed=seed,
        )  # fmt: skip

    def behaviour_value(self, confidence: float, seed: int) -> tuple[float, float, float]:
        """Value of the behaviour policy, and its bounds."""
        low, high = self.return_range
        bounds = mean_bounds(
            self.behaviour_scores[None], np.array([low - self.behaviour_max_deviation]),
            np.array([high + self.behaviour_max_deviation]),
            upper_samples=self.behaviour_scores_high[None], confidence=confidence, seed=seed,
        )  # fmt: skip
        return float(self.behaviour_scores.mean()), float(bounds[0][0]), float(bounds[1][0])


def _score_bounds(
    least: FloatArray, most: FloatArray, deviation: FloatArray, **options: Any
) -> tuple[FloatArray, FloatArray]:
    lowest, highest = least.mean(1) - deviation[:, 0], most.mean(1) + deviation[:, 1]
    return mean_bounds(least, lowest, highest, upper_samples=most, **options)
