"""Short descriptions of spaces, specs and arrays for messages; long bounds are shortened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike
from torchrl.data import Composite, TensorSpec

ENTRIES = 6


def describe_space(space: Any) -> str:
    """A Gymnasium space or TorchRL spec: type, shape, dtype and bounds; a Dict by its names alone."""
    name = type(space).__name__
    if isinstance(space, spaces.Dict | Composite):
        return f"{name} of {_shortened(repr(key) for key in sorted(space.keys()))}"
    if isinstance(space, spaces.Tuple):
        return f"{name} of {len(space.spaces)} spaces"
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.size > ENTRIES:
        return f"{name} of shape {space.shape}, {_range(space.nvec)} categories each"
    if not isinstance(space, spaces.Box | TensorSpec):
        known = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        return str(space) if isinstance(space, known) else name
    limits: Any = space if isinstance(space, spaces.Box) else space.space
    text = f"{name} of shape {tuple(space.shape)}, {str(space.dtype).removeprefix('torch.')}"
    if not hasattr(limits, "low"):
        return text
    low, high = (torch.as_tensor(bound).double().cpu() for bound in (limits.low, limits.high))
    return f"{text}, {bounds_in_words(low, high)}"


def bounds_in_words(low: ArrayLike, high: ArrayLike) -> str:
    """``[low, high]`` where all dimensions share them, otherwise both lists, or their ranges."""
    low, high = np.asarray(low), np.asarray(high)
    if low.size and np.unique(low).size == 1 and np.unique(high).size == 1:
        return f"[{_number(low.flat[0])}, {_number(high.flat[0])}]"
    describe = describe_values if low.size <= ENTRIES else _range
    return f"low {describe(low)}, high {describe(high)}"


def describe_values(values: ArrayLike) -> str:
    """The first entries of an array and how many there are: ``[0.1, 0.2, ... (300 in all)]``."""
    return f"[{_shortened(map(_number, np.asarray(values).flat))}]"


def one_line(error: BaseException) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split())


def faulty_bounds(low: ArrayLike, high: ArrayLike, *, largest: float = np.inf) -> str:
    """The faults of the bounds of an action, by dimension; empty for valid bounds.

    Both must be finite, which here means of a magnitude below ``largest``, and low at most high.
    """
    faults: dict[str, list[int]] = {}
    pairs = zip(np.asarray(low).flat, np.asarray(high).flat, strict=True)
    for dimension, (bottom, top) in enumerate(pairs):
        lacks = [n for n, ok in (("lower", bottom > -largest), ("upper", top < largest)) if not ok]
        if lacks:
            fault = "no finite bounds" if len(lacks) == 2 else f"no finite {lacks[0]} bound"
            faults.setdefault(fault, []).append(dimension)
        elif not bottom <= top:
            fault = f"low {_number(bottom)} above high {_number(top)}"
            faults.setdefault(fault, []).append(dimension)
    return "; ".join(
        f"{'dimension' if len(places) == 1 else 'dimensions'} {describe_values(places)[1:-1]}: {fault}"
        for fault, places in list(faults.items())[:ENTRIES]
    )


def _shortened(words: Iterable[str]) -> str:
    listed = list(words)
    more = f", ... ({len(listed)} in all)" if len(listed) > ENTRIES else ""
    return ", ".join(listed[:ENTRIES]) + more


def _range(values: Any) -> str:
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} to {high}"


def _number(value: Any) -> str:
    return str(value) if isinstance(value, bool | np.bool_) else f"{value:g}"
