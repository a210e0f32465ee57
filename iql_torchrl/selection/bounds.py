"""Confidence bounds of means over episodes that hold for few episodes and for many candidates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]

MAX_DRAWS, MIN_DRAWS = 10_000, 2_000
WEIGHTS_AT_ONCE = 2**22
TOTAL_WEIGHTS = 3 * 10**7


def mean_bounds(
    samples: FloatArray,
    lowest: FloatArray,
    highest: FloatArray,
    *,
    upper_samples: FloatArray | None = None,
    together: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray]:
    """Lower and upper bounds of the means of P quantities ``(P, E)`` that hold for all at once.

    The lower bound of one quantity is the ``(1 - confidence) / 2`` quantile of
    ``sum_e w_e x_e + w_0 lowest``, with weights ``w`` of the E episodes and of one worst possible
    episode that are uniform on the simplex: Phan, Thomas, Learned-Miller 2021, "Towards practical
    mean bounds for small samples" (arXiv:2106.03163), for the order of sample means. It assumes only
    that no value is below ``lowest``. The upper bound uses ``highest`` in the same way.

    For P > 1 the smallest rank over the quantities, with the same draws for each, has the quantile, so
    all P bounds of one side hold together (Mandel and Betensky 2008, "Simultaneous confidence intervals
    based on the percentile bootstrap approach", section 2). Bounds of a quantity that is NaN are NaN;
    the others do not depend on it.

    Args:
        samples: ``(P, E)``, E >= 1.
        lowest, highest: ``(P,)``, bounds of the value of one more episode.
        upper_samples: samples for the upper bounds, if only bounds of the samples are known
            (``samples`` below, these above); None: ``samples``.
        together: False: each interval alone has the confidence.
        confidence: of the P intervals together, or of each, in (0, 1).
        seed: of the weights.
    """
    upper = samples if upper_samples is None else upper_samples
    lowest, highest = np.minimum(lowest, samples.min(1)), np.maximum(highest, upper.max(1))
    draws = [
        (w[:, :-1] @ samples.T + w[:, -1:] * lowest, -(w[:, :-1] @ upper.T + w[:, -1:] * highest))
        for w in _weights(samples.shape[1], seed)
    ]
    level = (1 - confidence) / 2
    low, high = (
        _quantile(np.concatenate(side), level, together) for side in zip(*draws, strict=True)
    )
    return low, -high


def _weights(episodes: int, seed: int) -> Iterator[FloatArray]:
    """Draws from the uniform distribution on the simplex of E + 1 weights, ``(draws, E + 1)``."""
    size = episodes + 1
    total = int(np.clip(TOTAL_WEIGHTS // size, MIN_DRAWS, MAX_DRAWS))
    generator = np.random.default_rng(seed)
    at_once = max(WEIGHTS_AT_ONCE // size, 1)
    for begin in range(0, total, at_once):
        weights = generator.standard_exponential((min(at_once, total - begin), size))
        yield weights / weights.sum(1, keepdims=True)


def _quantile(draws: FloatArray, level: float, together: bool) -> FloatArray:
    """Per column the quantile of its draws; the share ``level`` is of it alone, or of any column."""
    place, known = int(level * len(draws)), ~np.isnan(draws).any(axis=0)
    if together and known.sum() > 1:
        smallest = stats.rankdata(draws[:, known], "ordinal", axis=0).min(axis=1) - 1
        place = int(np.quantile(smallest, level))
    return np.asarray(np.sort(draws, axis=0)[place])
