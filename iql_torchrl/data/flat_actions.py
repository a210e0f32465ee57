"""Continuous actions of any shape as vectors, in the data and in the environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TransformAction
from numpy.typing import NDArray

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import describe_space

__all__ = ["FlatActions", "flat_space"]


def flat_space(space: gym.Space[Any], name: str) -> spaces.Box:
    """The Box ``(A,)`` of the flattened actions of ``space``.

    Raises ``DatasetError`` for another space than a Box.
    """
    if not isinstance(space, spaces.Box):
        raise DatasetError(
            f"{name}: the actions are {describe_space(space)}; flatten_actions is for a Box."
        )
    low, high = (np.asarray(bound).reshape(-1) for bound in (space.low, space.high))
    return spaces.Box(low, high, low.shape, space.dtype.type)


@dataclass(frozen=True)
class FlatActions:
    """Makes the environment of ``make_env`` with actions ``(A,)`` in place of ``(*shape)``.

    It can be sent to another process if ``make_env`` can.
    """

    make_env: Callable[[], gym.Env[Any, Any]]
    name: str

    def __call__(self) -> gym.Env[Any, Any]:
        env = self.make_env()
        space = env.action_space
        shape = tuple(space.shape or ())
        return TransformAction(env, partial(_shaped, shape), flat_space(space, self.name))


def _shaped(shape: tuple[int, ...], action: Any) -> NDArray[Any]:
    return np.asarray(action).reshape(shape)
