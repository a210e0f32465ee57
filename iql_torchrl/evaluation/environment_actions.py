"""Conversion of a policy's actions into those that an environment takes, with checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.descriptions import bounds_in_words, describe_space, describe_values

__all__ = ["Moments", "environment_actions"]


Moments = Sequence[tuple[int, int]]
ACTION_TOLERANCE = 1e-6


def environment_actions(actions: Tensor, space: spaces.Space[Any], moments: Moments) -> list[Any]:
    """The policy's actions ``(B, ...)``, checked, each in the form that the environment accepts.

    ``moments`` are the ``(episode, step)`` of each row, for messages. For Discrete: Python
    integers, from indices counted from zero or the largest of n values. For Box: arrays in the
    space's dtype, clipped where they exceed a bound by at most 1e-6 (relative beyond 1).

    Raises:
        ValueError: an action is NaN, infinite, out of bounds or of the wrong shape.
    """
    actions = actions.detach().cpu()
    values = (actions.double() if actions.is_floating_point() else actions).numpy()
    if values.shape[:1] != (len(moments),):
        raise ValueError(
            f"policy output 'action' must have a leading batch of {len(moments)}, found shape "
            f"{values.shape}"
        )
    if isinstance(space, spaces.Discrete):
        _refuse(np.isnan(values), values, moments, "is NaN; look for NaN in its parameters")
        return _discrete_actions(values, space)
    if isinstance(space, spaces.Box):
        return _box_actions(values, space, moments)
    raise ValueError(
        f"the action space must be Box or Discrete, found {describe_space(space)}; wrap the "
        f"environment"
    )


def _refuse(
    wrong: NDArray[np.bool_],
    values: NDArray[Any],
    moments: Moments,
    message: str,
) -> None:
    if wrong.any():
        row = int(wrong.reshape(len(moments), -1).any(axis=1).argmax())
        episode, step = moments[row]
        dimension = int(wrong.reshape(len(moments), -1)[row].argmax())
        place = f" in dimension {dimension}," if values[row].size > 1 else ""
        raise ValueError(
            f"policy output 'action' {describe_values(values[row])}{place} at step {step} of "
            f"episode {episode} {message}"
        )


def _discrete_actions(values: NDArray[Any], space: spaces.Discrete) -> list[Any]:
    count = int(space.n)
    if values.ndim == 2 and values.shape[1] == count and count > 1:
        indices = values.argmax(axis=1)
    elif values.shape[1:] in ((), (1,)) and np.issubdtype(values.dtype, np.integer):
        indices = values.reshape(-1)
    else:
        raise ValueError(
            f"policy output 'action' must be integer indices (B,) or (B, 1), or (B, {count}) "
            f"one-hot, for {space}; found {values.dtype} of shape {values.shape}"
        )
    if indices.min() < 0 or indices.max() >= count:
        raise ValueError(
            f"policy output 'action' must be indices in 0..{count - 1} for {space}, found "
            f"{indices.min()}..{indices.max()}"
        )
    return [int(index) + int(space.start) for index in indices]


def _box_actions(values: NDArray[Any], space: spaces.Box, moments: Moments) -> list[Any]:
    if values.shape[1:] != space.shape:
        raise ValueError(
            f"policy output 'action' must have shape {(len(moments), *space.shape)} for "
            f"{describe_space(space)}, found {values.shape}"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    below = low - ACTION_TOLERANCE * np.maximum(1.0, np.abs(low))
    above = high + ACTION_TOLERANCE * np.maximum(1.0, np.abs(high))
    bounds = f"the bounds {bounds_in_words(space.low, space.high)}"
    _refuse(~np.isfinite(values), values, moments, f"is not finite; it must be within {bounds}")
    _refuse(
        (values < below) | (values > above),
        values,
        moments,
        f"is outside {bounds}; bound the policy, or wrap the environment in "
        f"gymnasium.wrappers.ClipAction or RescaleAction if that is how the data was recorded",
    )
    return list(np.clip(values, low, high).astype(space.dtype))
