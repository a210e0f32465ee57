"""When two numbers are equal but for rounding: observations, and actions at a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Observations whose difference has at most this Euclidean norm are equal.
EQUAL = 1e-6
#: Numbers that differ by at most so many units of rounding of their dtype are equal.
UNITS = 8


def rounding(*dtypes: Any) -> float:
    """Relative error of rounding of the least precise of the float dtypes; 0 if there is none."""
    floats = [np.dtype(kind) for kind in dtypes if np.dtype(kind).kind == "f"]
    return UNITS * max((float(np.finfo(kind).eps) for kind in floats), default=0.0)


def outside_bounds(
    values: NDArray[Any], low: ArrayLike, high: ArrayLike, stored: Any = np.float32
) -> NDArray[np.bool_]:
    """True where an action is outside ``[low, high]`` by more than rounding, shape of ``values``.

    Bounds are stored in float32, so the tolerance is 8 units of rounding of float32, or of the dtype of
    ``values`` or ``stored`` (the dtype that they had) if that is less precise, relative to the larger
    of the bound and the range (1 if that is infinite); for integers it is 0. NaN is not outside.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    slack: Any = 0.0
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            scale = np.stack(np.broadcast_arrays(np.abs(low), np.abs(high), high - low))
        scale[~np.isfinite(scale)] = 1.0  # an infinite range has no size
        slack = rounding(np.float32, values.dtype, stored) * scale.max(axis=0)
    return np.asarray((values < low - slack) | (values > high + slack))
