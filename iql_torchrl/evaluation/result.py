"""The results of an evaluation: returns, lengths, successes, scores, and their means with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.evaluation.statistics import bootstrap_interval, standard_error, wilson_interval

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Results of :func:`evaluate`; every array has one entry per episode, in episode order.

    Attributes:
        returns: undiscounted sum of the rewards, float64.
        lengths: steps taken, int64.
        successes: whether ``info`` reported ``success`` (or ``is_success``) at any step; None
            if some episode never reported either.
        scores: ``100 * (return - random) / (expert - random)``; None without reference scores.
        goals: the number of each episode's goal, int64; None without ``goals=``.
    """

    returns: FloatArray
    lengths: NDArray[np.int64]
    successes: NDArray[np.bool_] | None = None
    scores: FloatArray | None = None
    goals: NDArray[np.int64] | None = None

    @property
    def goal_success_rates(self) -> FloatArray:
        """The share of successful episodes of each goal, float64 ``(G,)``.

        Raises ``ValueError`` where the evaluation has no goals, or an episode reported no success.
        """
        if self.goals is None or self.successes is None:
            missing = "goals=" if self.goals is None else "'success' in the environment's info"
            raise ValueError(f"the evaluation was made without {missing}, so goals have no rates.")
        return np.bincount(self.goals, self.successes) / np.bincount(self.goals)

    def summary(self, *, seed: int = 0) -> dict[str, float]:
        """The results as plain floats, for a logger.

        Standard errors are the sample deviation (``ddof=1``) over ``sqrt(episodes)``: NaN for
        one episode. ``_low`` and ``_high`` bound the mean return, the mean score and the success
        rate with 95 % confidence: percentile bootstrap over episodes, resampled from ``seed``,
        and Wilson's interval for the rate; the first two are NaN for one episode. The intervals
        describe episodes of one trained policy; they do not include the effect of training seeds.
        """
        result = {
            "episodes": float(len(self.returns)),
            "return_min": float(self.returns.min()),
            "return_max": float(self.returns.max()),
            "length_mean": float(self.lengths.mean()),
        }
        for name, values in (("return", self.returns), ("score", self.scores)):
            if values is not None:
                low, high = bootstrap_interval(values, seed=seed)
                result |= {f"{name}_mean": float(values.mean()), f"{name}_low": low}
                result |= {f"{name}_high": high, f"{name}_standard_error": standard_error(values)}
        if self.successes is not None:
            low, high = wilson_interval(int(self.successes.sum()), len(self.successes))
            result["success_rate"] = float(self.successes.mean())
            result["success_low"], result["success_high"] = low, high
            if self.goals is not None:
                rates = enumerate(self.goal_success_rates)
                result |= {f"success_rate_goal_{n}": float(rate) for n, rate in rates}
        return result
