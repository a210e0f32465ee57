"""Short descriptions of spaces, specs and arrays for messages; long bounds are shortened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike
from torchrl.data import Composite, TensorSpec

__all__ = [
    "bounds_in_words",
    "describe_space",
    "describe_spec",
    "describe_values",
    "faulty_bounds",
    "one_line",
]

ENTRIES = 6


def describe_space(space: Any) -> str:
    """A Gymnasium space: its type, shape, dtype and bounds; a Dict by its names alone."""
    name = type(space).__name__
    if isinstance(space, spaces.Box):
        shape = tuple(space.shape)
        return f"{name} of shape {shape}, {space.dtype}, {bounds_in_words(space.low, space.high)}"
    if isinstance(space, spaces.Dict):
        return f"{name} of {_names(space.spaces)}"
    if isinstance(space, spaces.Tuple):
        return f"{name} of {len(space.spaces)} spaces"
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.size > ENTRIES:
        return f"{name} of shape {space.shape}, {_range(space.nvec)} categories each"
    known = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    return str(space) if isinstance(space, known) else name


def describe_spec(spec: Any) -> str:
    """A TorchRL spec: its type, shape, dtype and, where it has them, bounds."""
    name = type(spec).__name__
    if isinstance(spec, Composite):
        return f"{name} of {_names(map(str, spec.keys()))}"
    if not isinstance(spec, TensorSpec):
        return name
    text = f"{name} of shape {tuple(spec.shape)}, {str(spec.dtype).removeprefix('torch.')}"
    low, high = (getattr(getattr(spec, "space", None), bound, None) for bound in ("low", "high"))
    if low is None or high is None:
        return text
    low, high = (bound.detach().double().cpu().numpy() for bound in (low, high))
    return f"{text}, {bounds_in_words(low, high)}"


def bounds_in_words(low: ArrayLike, high: ArrayLike) -> str:
    """``[low, high]`` where all dimensions share them, otherwise both lists, or their ranges."""
    low, high = np.asarray(low), np.asarray(high)
    if low.size and np.unique(low).size == 1 and np.unique(high).size == 1:
        return f"[{_number(low.flat[0])}, {_number(high.flat[0])}]"
    if low.size <= ENTRIES:
        return f"low {describe_values(low)}, high {describe_values(high)}"
    return f"low {_range(low)}, high {_range(high)}"


def describe_values(values: ArrayLike) -> str:
    """The first entries of an array and how many there are: ``[0.1, 0.2, ... (300 in all)]``."""
    flat = np.asarray(values).reshape(-1)
    shown = ", ".join(_number(value) for value in flat[:ENTRIES])
    return f"[{shown}{f', ... ({flat.size} in all)' if flat.size > ENTRIES else ''}]"


def one_line(error: BaseException) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split())


def faulty_bounds(low: ArrayLike, high: ArrayLike, *, largest: float = np.inf) -> str:
    """The faults of the bounds of an action, by dimension; empty for valid bounds.

    Both must be finite, which here means of a magnitude below ``largest``, and low below high.
    """
    faults: dict[str, list[int]] = {}
    pairs = zip(np.asarray(low).reshape(-1), np.asarray(high).reshape(-1), strict=True)
    for dimension, (bottom, top) in enumerate(pairs):
        if fault := _fault(bottom > -largest, top < largest, bottom, top):
            faults.setdefault(fault, []).append(dimension)
    return "; ".join(
        f"{'dimension' if len(places) == 1 else 'dimensions'} {describe_values(places)[1:-1]}: {fault}"
        for fault, places in list(faults.items())[:ENTRIES]
    )


def _fault(has_lower: bool, has_upper: bool, bottom: Any, top: Any) -> str:
    if not has_lower and not has_upper:
        return "no finite bounds"
    if not has_lower or not has_upper:
        return f"no finite {'upper' if has_lower else 'lower'} bound"
    return "" if bottom < top else f"no range, from {_number(bottom)} to {_number(top)}"


def _names(names: Iterable[Any]) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > ENTRIES else ""
    return ", ".join(map(repr, names[:ENTRIES])) + more


def _range(values: Any) -> str:
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} to {high}"


def _number(value: Any) -> str:
    return str(value) if isinstance(value, bool | np.bool_) else f"{value:g}"
