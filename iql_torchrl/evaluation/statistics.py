"""Standard errors and confidence intervals of means and rates; rank correlations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "bootstrap_interval",
    "mean_interval",
    "rank_correlations",
    "standard_error",
    "wilson_interval",
]

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
DRAWS_AT_ONCE = 2**18  # limits the memory, and fits into a processor's cache


def standard_error(values: FloatArray) -> float:
    """Sample deviation (``ddof=1``) over ``sqrt(n)``; NaN for one value."""
    return float(stats.sem(values)) if len(values) > 1 else math.nan


def bootstrap_interval(values: FloatArray, *, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` ``(n,)``.

    From 2000 resamples of n values each, drawn with replacement from ``seed``; NaN for n = 1 and
    for values that are not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWS_AT_ONCE // len(values)),
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a binomial rate (Wilson 1927), within 0..1.

    ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with ``p = successes / trials``:
    unlike the normal interval its width is not 0 when all or none succeed.
    """
    low, high = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def mean_interval(
    values: FloatArray, *, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean over the first axis of ``(runs, *B)`` and its Student-t bounds, each ``(*B,)``.

    ``mean -+ t(runs - 1) * s / sqrt(runs)`` with the sample deviation s. Raises ``ValueError`` for
    fewer than two runs.
    """
    runs = len(values)
    if runs < 2:
        raise ValueError(f"an interval over runs needs at least two runs; there are {runs}.")
    mean = values.mean(0)
    half = stats.t.ppf((1 + confidence) / 2, runs - 1) * stats.sem(values)
    return mean, mean - half, mean + half


def rank_correlations(one: ArrayLike, other: ArrayLike) -> tuple[float, float]:
    """Spearman's rank correlation and Kendall's tau-b of two sequences ``(n,)``, in [-1, 1].

    NaN where they are not defined: n < 2, an entry is NaN, or a sequence is constant.
    """
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if len(first) < 2 or not (np.ptp(first) > 0 and np.ptp(second) > 0):
        return math.nan, math.nan
    spearman, kendall = stats.spearmanr(first, second), stats.kendalltau(first, second)
    return float(spearman.statistic), float(kendall.statistic)
