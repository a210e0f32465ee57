"""Logged bandit feedback whose truth is known: contexts, many actions, rare clicks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Policy = Callable[[FloatArray], FloatArray]  # contexts (N, D) -> probabilities (N, K)
TRUTH_CONTEXTS = 100_000


class Logged(NamedTuple):
    """N rounds: context ``(N, D)``, action, reward and the behaviour's probabilities ``(N, K)``."""

    context: FloatArray
    action: NDArray[np.int64]
    reward: FloatArray
    propensities: FloatArray

    def split(self, first: int) -> tuple[Logged, Logged]:
        return Logged(*(x[:first] for x in self)), Logged(*(x[first:] for x in self))


@dataclass(frozen=True)
class Bandit:
    """Clicks of probability ``exp(linear)``, at most a half, with mean ``rate`` over arms.

    ``behaviour``: "uniform"; "softmax" of an imperfect guess of the linear predictor; or
    "deterministic": the best arm of that guess, with 5 % of the rounds uniform. ``matters``: whether
    clicks depend on the context.
    """

    arms: int
    rate: float
    behaviour: str
    matters: bool
    seed: int = 0
    dimension: int = 4

    @cached_property
    def parameters(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        draw = np.random.default_rng(self.seed)
        shape = self.dimension, self.arms
        slope, arm = (
            0.6 * draw.standard_normal(shape) * self.matters,
            0.6 * draw.standard_normal(self.arms),
        )
        guessed = 0.5 * slope + 0.4 * draw.standard_normal(shape) * self.matters
        contexts = draw.standard_normal((TRUTH_CONTEXTS, self.dimension))
        level = np.log(self.rate / np.exp(contexts @ slope + arm).mean())
        return (
            slope,
            arm + level,
            guessed,
            0.5 * arm + 0.4 * draw.standard_normal(self.arms),
            contexts,
        )

    def click(self, context: FloatArray) -> FloatArray:
        slope, arm, *_ = self.parameters
        return np.minimum(np.exp(context @ slope + arm), 0.5)

    def guess(self, context: FloatArray) -> FloatArray:
        _, _, slope, arm, _ = self.parameters
        return context @ slope + arm

    def propensities(self, context: FloatArray) -> FloatArray:
        if self.behaviour == "uniform":
            return np.full((len(context), self.arms), 1 / self.arms)
        guess = self.guess(context)
        if self.behaviour == "softmax":
            return softmax(2 * guess)
        return 0.95 * np.eye(self.arms)[guess.argmax(1)] + 0.05 / self.arms

    def dataset(self, rounds: int, seed: int) -> Logged:
        draw = np.random.default_rng(seed)
        context = draw.standard_normal((rounds, self.dimension))
        propensities = self.propensities(context)
        action = (draw.random(rounds)[:, None] > propensities.cumsum(1)).sum(1)
        action = action.clip(max=self.arms - 1)
        chance = self.click(context)[np.arange(rounds), action]
        return Logged(context, action, (draw.random(rounds) < chance).astype(float), propensities)

    def value(self, policy: Policy) -> float:
        """The policy's click rate over 100,000 contexts."""
        contexts = self.parameters[-1]
        return float((policy(contexts) * self.click(contexts)).sum(1).mean())

    def policies(self) -> dict[str, Policy]:
        """Uniform; a softmax and the best arm of the true predictor; one unlike the behaviour."""

        def predictor(context: FloatArray) -> FloatArray:
            slope, arm, *_ = self.parameters
            return context @ slope + arm

        return {
            "uniform": lambda x: np.full((len(x), self.arms), 1 / self.arms),
            "softmax": lambda x: softmax(1.5 * predictor(x)),
            "greedy": lambda x: np.eye(self.arms)[predictor(x).argmax(1)],
            "unlike": lambda x: softmax(3 * self.guess(x[:, ::-1])),
        }


def softmax(logits: FloatArray) -> FloatArray:
    weight = np.exp(logits - logits.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


def arm_means(logged: Logged, prior: float = 200.0) -> FloatArray:
    """Click rate of each arm ``(K,)``, shrunk to the mean as if it had been seen ``prior`` times."""
    arms = logged.propensities.shape[1]
    count = np.bincount(logged.action, minlength=arms)
    clicks = np.bincount(logged.action, logged.reward, arms)
    return (clicks + prior * logged.reward.mean()) / (count + prior)


# arms, click rate, behaviour, contexts matter, rounds: every level of each occurs, not every product
FAMILIES = (
    (5, 0.05, "uniform", True, 2_000),
    (5, 0.01, "softmax", False, 2_000),
    (5, 0.003, "deterministic", True, 10_000),
    (34, 0.004, "uniform", True, 10_000),
    (34, 0.004, "softmax", True, 10_000),
    (34, 0.05, "deterministic", False, 2_000),
    (80, 0.004, "uniform", False, 10_000),
    (80, 0.01, "softmax", True, 10_000),
    (80, 0.004, "deterministic", True, 10_000),
    (80, 0.004, "uniform", True, 50_000),
)
