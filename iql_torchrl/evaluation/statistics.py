"""Standard errors, confidence intervals, rank correlations, and scores over several tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
STRATIFIED_RESAMPLES = 50_000
DRAWS_AT_ONCE = 2**18  # limits the memory, and fits into a processor's cache


def standard_error(values: FloatArray) -> float:
    """Sample deviation (``ddof=1``) over ``sqrt(n)``; NaN for one value."""
    return float(stats.sem(values)) if len(values) > 1 else math.nan


def bootstrap_interval(values: FloatArray, *, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` ``(n,)``.

    From 2000 resamples of n values each, drawn with replacement from ``seed``; NaN for n = 1 and
    for values that are not finite.
    """
    return _percentiles(np.mean, (values,), RESAMPLES, seed)


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
    runs, mean = len(values), values.mean(0)
    if runs < 2:
        raise ValueError(f"an interval over runs needs at least two runs; there are {runs}.")
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


def interquartile_mean(*tasks: ArrayLike, axis: int = -1) -> Any:
    """Mean of the middle half of all scores of all tasks.

    ``tasks``: the scores of each, with the runs on ``axis``; other axes are kept and must agree.
    Of the n scores together, the ``floor(n / 4)`` lowest and highest are left out (Agarwal et al.
    2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", section 4.3). It
    is less sensitive to single runs than the mean and needs fewer runs than the median.
    """
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def probability_of_improvement(*tasks: ArrayLike, axis: int = -1) -> Any:
    """Probability that a run of one method has a higher score than a run of another one, in [0, 1].

    ``tasks``: the scores of the first method on each task, then those of the second in the same
    order, with the runs on ``axis``; other axes are kept and must agree. Of each task the share of
    all pairs of runs in which the first is higher, equal scores counted by half (the Mann-Whitney
    statistic over the number of pairs); of these shares the mean (Agarwal et al. 2021, section
    4.3). 0.5 where the methods are alike. Raises ``ValueError`` on an odd number of arrays.
    """
    if len(tasks) % 2 or not tasks:
        raise ValueError(f"{len(tasks)} arrays; expected as many of the second method as the first")
    arrays = [np.moveaxis(np.asarray(scores), axis, -1) for scores in tasks]
    half = len(arrays) // 2
    shares = [
        0.5 + 0.5 * np.sign(one[..., :, None] - other[..., None, :]).mean((-2, -1))
        for one, other in zip(arrays[:half], arrays[half:], strict=True)
    ]
    return np.mean(shares, axis=0)


def stratified_interval(
    statistic: Callable[..., Any], samples: Sequence[FloatArray], *, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of ``statistic(*samples, axis=-1)``.

    The runs of every task (and method) are drawn with replacement separately, 50,000 times, from
    ``seed``, so that each resample has every task with its number of runs (Agarwal et al. 2021,
    section 4.1: the stratified bootstrap). ``statistic``: :func:`interquartile_mean` or
    :func:`probability_of_improvement`. NaN where a sample has one run or a score is not finite.
    """
    return _percentiles(statistic, samples, STRATIFIED_RESAMPLES, seed)


def _percentiles(
    statistic: Callable[..., Any], samples: Sequence[FloatArray], resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of ``statistic(*samples, axis=-1)``; each sample is drawn by itself."""
    if any(len(sample) < 2 or not np.isfinite(sample).all() for sample in samples):
        return math.nan, math.nan
    low, high = stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // sum(len(sample) for sample in samples)),
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)
