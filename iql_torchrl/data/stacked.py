"""Spaces and statistics of stacked frames, from those of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data.scaling import ObservationStatistics
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import stack_frames

__all__ = ["stacked_space", "stacked_statistics"]

Name = TypeVar("Name")


def stacked_space(space: gym.Space[Any], length: int) -> gym.Space[Any]:
    """The space of ``length`` stacked observations of ``space``, as tables hold them.

    ``networks.stack_frames`` gives the shapes; categories count from zero. A Discrete becomes a
    MultiDiscrete. With ``length=1``: ``space`` itself. Raises ``ValueError`` on a space that is no
    Box, Discrete, MultiDiscrete, MultiBinary or Dict of them.
    """
    if length == 1:
        return space
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(k, stacked_space(v, length)) for k, v in space.spaces.items()])
    if isinstance(space, spaces.Box):
        low, high = (_repeated(bound, length) for bound in (space.low, space.high))
        return spaces.Box(low, high, low.shape, space.dtype.type)
    if isinstance(space, spaces.Discrete):
        return spaces.MultiDiscrete([int(space.n)] * length)
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(_repeated(space.nvec, length))
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary(_repeated(np.zeros(space.shape, np.int8), length).shape)
    raise ValueError(
        f"{describe_space(space)} cannot be stacked; expected Box, Discrete, MultiDiscrete, "
        "MultiBinary, or a Dict of them."
    )


def stacked_statistics(
    statistics: Mapping[Name, ObservationStatistics], length: int
) -> dict[Name, ObservationStatistics]:
    """Every frame of a stack has the statistics of one frame."""
    result = {}
    for key, one in statistics.items():
        still = torch.zeros(one.mean.numel(), dtype=torch.bool)
        still[list(one.constant)] = True
        mean, std, constant = (
            _of_stack(values, length) for values in (one.mean, one.std, still.view_as(one.mean))
        )
        places = tuple(constant.flatten().nonzero().squeeze(1).tolist())
        result[key] = ObservationStatistics(mean, std, places, one.count)
    return result


def _of_stack(values: Tensor, length: int) -> Tensor:
    return stack_frames(values.expand(1, length, *values.shape), values.ndim).squeeze(0).clone()


def _repeated(values: NDArray[Any], length: int) -> NDArray[Any]:
    return _of_stack(torch.as_tensor(np.array(values)), length).numpy()
