"""Confidence intervals of a mean over a few runs, by Student's t."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["mean_interval", "student_t"]

FloatArray = NDArray[np.float64]


def mean_interval(
    values: FloatArray, *, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean over the first axis of ``(runs, *B)`` and its Student-t bounds, each ``(*B,)``.

    ``mean -+ t(runs - 1) * s / sqrt(runs)`` with the sample deviation s; wants at least two runs.
    """
    runs = len(values)
    if runs < 2:
        raise ValueError(f"an interval over runs wants at least two; there are {runs}.")
    mean = values.mean(0)
    half = student_t(runs - 1, confidence=confidence) * values.std(0, ddof=1) / math.sqrt(runs)
    return mean, mean - half, mean + half


def student_t(degrees: int, *, confidence: float = 0.95) -> float:
    """The ``t`` with ``P(|T| <= t) = confidence`` for Student's T with ``degrees`` of freedom.

    By bisection of the finite series in the angle ``atan(t / sqrt(degrees))`` (Abramowitz and
    Stegun 1964, 26.7.3 and 26.7.4). Raises ``ValueError`` unless ``degrees >= 1`` is whole and
    ``0 < confidence < 1``.
    """
    if degrees != int(degrees) or degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"degrees is {degrees} and confidence {confidence}; see the docstring.")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, int(degrees)) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(high) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle))."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
