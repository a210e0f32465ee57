"""Confidence bounds of means over episodes that hold for few episodes and for many candidates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["mean_bounds"]

FloatArray = NDArray[np.float64]

MAX_DRAWS, MIN_DRAWS = 20_000, 2_000
WEIGHTS_AT_ONCE = 2**22
TOTAL_WEIGHTS = 10**8


def mean_bounds(
    samples: FloatArray,
    lowest: FloatArray,
    highest: FloatArray,
    *,
    upper_samples: FloatArray | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray]:
    """Lower and upper bounds of the means of P quantities ``(P, E)``; all hold at once.

    The lower bound of one quantity is the ``(1 - confidence) / 2`` quantile of
    ``sum_e w_e x_e + w_0 lowest``, where the weights ``w`` of the E sampled episodes and of one
    more, as bad as can be, are uniform on the simplex (spacings of ordered uniform numbers). This
    is the bound of Phan, Thomas, Learned-Miller 2021, "Towards practical mean bounds for small
    samples" (arXiv:2106.03163), for the order of sample means; it approaches the interval of the
    central limit theorem for many episodes, and assumes only that nothing lies below ``lowest``.
    The upper bound does the same with ``highest``.

    For P > 1 the quantile is chosen, from the same draws for every quantity, such that all P
    bounds of one side hold together: the smallest rank over the quantities has the wanted
    quantile (Mandel and Betensky 2008, "Simultaneous confidence intervals based on the percentile
    bootstrap approach", section 2). Correlated quantities cost less than independent ones.

    Args:
        samples: one row per quantity, one column per episode; E >= 1.
        lowest, highest: ``(P,)``, bounds of what one more episode could give.
        upper_samples: what the upper bounds are of, where the quantities are only known to lie
            between two others; None: ``samples``.
        confidence: of the P intervals together, in (0, 1).
        seed: of the weights.
    """
    sides = []
    upper = samples if upper_samples is None else upper_samples
    for values, extreme, sign in ((samples, lowest, 1.0), (upper, highest, -1.0)):
        sampled = np.asarray(values, np.float64)
        limit = np.minimum(sign * np.asarray(extreme, np.float64), (sign * sampled).min(1))
        draws = np.concatenate(
            [w[:, :-1] @ (sign * sampled.T) + w[:, -1:] * limit for w in _weights(sampled, seed)]
        )
        sides.append(sign * _simultaneous_quantile(draws, (1 - confidence) / 2))
    return sides[0], sides[1]


def _weights(samples: FloatArray, seed: int) -> Iterator[FloatArray]:
    """Draws from the uniform distribution on the simplex of E + 1 weights, ``(draws, E + 1)``."""
    size = samples.shape[1] + 1
    total = int(np.clip(TOTAL_WEIGHTS // size, MIN_DRAWS, MAX_DRAWS))
    generator = np.random.default_rng(seed)
    at_once = max(WEIGHTS_AT_ONCE // size, 1)
    for begin in range(0, total, at_once):
        weights = generator.standard_exponential((min(at_once, total - begin), size))
        yield weights / weights.sum(1, keepdims=True)


def _simultaneous_quantile(draws: FloatArray, level: float) -> FloatArray:
    """Per column the value below which, in any column, a draw falls with probability ``level``."""
    order = np.sort(draws, axis=0)
    ranks = np.empty(draws.shape, np.int64)
    rows = np.arange(len(draws))
    for column, indices in enumerate(draws.argsort(axis=0, kind="stable").T):
        ranks[indices, column] = rows
    place = int(np.floor(np.quantile(ranks.min(axis=1), level)))
    result: FloatArray = order[place]
    return result
