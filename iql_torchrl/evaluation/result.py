"""What the episodes of an evaluation say: returns, scores, and how far to trust their means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Evaluation",
    "bootstrap_interval",
    "reference_pair",
    "standard_error",
    "wilson_interval",
]

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
DRAWS_AT_ONCE = 2**18  # bounds the memory, and stays within a processor's cache
REFERENCE_NAMES = (
    ("random", "expert"),
    ("minimum", "maximum"),
    ("ref_min_score", "ref_max_score"),
)


@dataclass(frozen=True)
class Evaluation:
    """Results of :func:`evaluate`; every array has one entry per episode, in episode order.

    Attributes:
        returns: undiscounted sum of the rewards, float64.
        lengths: steps taken, int64.
        successes: whether ``info`` reported ``success`` (or ``is_success``) at any step; None
            if some episode never reported either.
        scores: ``100 * (return - random) / (expert - random)``; None without reference scores.
    """

    returns: FloatArray
    lengths: NDArray[np.int64]
    successes: NDArray[np.bool_] | None = None
    scores: FloatArray | None = None

    def summary(self, *, seed: int = 0) -> dict[str, float]:
        """Plain floats, ready for a logger.

        Standard errors are the sample deviation (``ddof=1``) over ``sqrt(episodes)``: NaN for
        one episode. ``_low`` and ``_high`` bound the mean return, the mean score and the success
        rate with 95 % confidence: percentile bootstrap over episodes, resampled from ``seed``,
        and Wilson's interval for the rate; the first two are NaN for one episode. The spread is
        that of episodes under one trained policy; it says nothing about other training seeds.
        """
        low, high = bootstrap_interval(self.returns, seed=seed)
        result = {
            "episodes": float(len(self.returns)),
            "return_mean": float(self.returns.mean()),
            "return_standard_error": standard_error(self.returns),
            "return_min": float(self.returns.min()),
            "return_max": float(self.returns.max()),
            "return_low": low,
            "return_high": high,
            "length_mean": float(self.lengths.mean()),
        }
        if self.scores is not None:
            low, high = bootstrap_interval(self.scores, seed=seed)
            result["score_mean"] = float(self.scores.mean())
            result["score_standard_error"] = standard_error(self.scores)
            result["score_low"], result["score_high"] = low, high
        if self.successes is not None:
            low, high = wilson_interval(int(self.successes.sum()), len(self.successes))
            result["success_rate"] = float(self.successes.mean())
            result["success_low"], result["success_high"] = low, high
        return result

    def state_dict(self) -> dict[str, Tensor | None]:
        """The arrays as tensors of their own dtypes; ``torch.load(weights_only=True)`` reads it."""
        arrays = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {k: None if v is None else torch.from_numpy(v.copy()) for k, v in arrays.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor | None]) -> Evaluation:
        """The evaluation whose :meth:`state_dict` is ``state``.

        Raises ``ValueError`` where the keys are others, or the arrays of unequal length.
        """
        wanted = {entry.name for entry in fields(cls)}
        if set(state) != wanted:
            raise ValueError(
                f"state holds the keys {sorted(state)}, wanted {sorted(wanted)}; pass what "
                f"Evaluation.state_dict() gave"
            )
        arrays: dict[str, Any] = {
            k: None if v is None else v.cpu().numpy().copy() for k, v in state.items()
        }
        if len({array.shape for array in arrays.values() if array is not None}) != 1:
            shapes = {k: v if v is None else v.shape for k, v in arrays.items()}
            raise ValueError(f"state holds arrays of shapes {shapes}, wanted one entry an episode")
        return cls(**arrays)


def reference_pair(reference_scores: Any) -> tuple[float, float] | None:
    """``(random, expert)`` from any of the forms that :func:`evaluate` takes."""
    if reference_scores is None:
        return None
    pair = None
    if isinstance(reference_scores, (tuple, list)):
        pair = tuple(reference_scores)
    else:
        for names in REFERENCE_NAMES:
            if all(hasattr(reference_scores, name) for name in names):
                pair = tuple(getattr(reference_scores, name) for name in names)
                break
    if pair is None or len(pair) != 2:
        raise ValueError(
            f"reference_scores must be None, (random, expert) or an object with attributes "
            f"{' or '.join(map(str, REFERENCE_NAMES))}, found {reference_scores!r}"
        )
    random, expert = float(pair[0]), float(pair[1])
    if not (math.isfinite(random) and math.isfinite(expert) and expert > random):
        raise ValueError(
            f"reference_scores must be finite with expert > random, found random={random}, "
            f"expert={expert}"
        )
    return random, expert


def standard_error(values: FloatArray) -> float:
    """Sample deviation (``ddof=1``) over ``sqrt(n)``; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def bootstrap_interval(values: FloatArray, *, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` ``(n,)``.

    From 2000 resamples of n values each, drawn with replacement from ``seed``; NaN for n = 1.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    generator, count = np.random.default_rng(seed), len(values)
    rows = max(1, DRAWS_AT_ONCE // count)
    means = [
        values[generator.integers(count, size=(min(rows, RESAMPLES - done), count))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a binomial rate (Wilson 1927), within 0..1.

    ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with ``p = successes / trials``:
    unlike the normal interval it keeps its width when all or none succeed.
    """
    z, rate = NormalDist().inv_cdf(0.975), successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    return min(max(low, 0.0), rate), max(min(high, 1.0), rate)  # against rounding at 0 and 1
