"""The usual encoding of each kind of observation as a vector of numbers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from torch import nn

from iql_torchrl.data.scaling import ObservationStatistics
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import Flatten, OneHot, OneHots, Standardise

__all__ = ["is_image", "is_vector", "usual_encoder"]

SMALLEST_IMAGE = 8  # pixels; what is smaller is a table of numbers


def is_vector(space: gym.Space[Any]) -> bool:
    """Whether observations are ``(F,)`` numbers, which networks read without an encoder."""
    return isinstance(space, spaces.Box | spaces.MultiBinary) and len(space.shape or ()) == 1


def is_image(space: gym.Space[Any]) -> bool:
    """Whether a space is one of images.

    A Box of three dimensions, at least 8 x 8 beside the channels, of uint8, or of floats in [0, 1].
    """
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        return False
    if sorted(space.shape)[1] < SMALLEST_IMAGE:
        return False
    fraction = bool((space.low == 0).all() and (space.high == 1).all())
    return space.dtype == np.uint8 or (np.issubdtype(space.dtype, np.floating) and fraction)


def usual_encoder(
    space: gym.Space[Any], statistics: ObservationStatistics | None, *, standardise: bool = True
) -> tuple[nn.Module, int]:
    """The encoder of a leaf of an observation space, without parameters, and its number of features.

    Boxes: flattened, and standardised with ``statistics`` where these are given and ``standardise``.
    Discrete and MultiDiscrete: one-hot. MultiBinary: 0 and 1.

    Raises ``ValueError`` for a space of another kind.
    """
    if isinstance(space, spaces.Discrete):
        return OneHot(int(space.n)), int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        counts = [int(n) for n in space.nvec.flatten()]
        return OneHots(counts, space.nvec.shape), sum(counts)
    if not isinstance(space, spaces.Box | spaces.MultiBinary):
        raise ValueError(
            f"observations are {describe_space(space)}; expected Box, Discrete, MultiDiscrete, "
            "MultiBinary, or a Dict of them."
        )
    shape = tuple(space.shape or ())
    features = int(np.prod(shape, dtype=np.int64))
    flatten = Flatten(shape)
    if isinstance(space, spaces.MultiBinary) or statistics is None or not standardise:
        return flatten, features
    scale = Standardise(statistics.mean.flatten(), statistics.std.flatten())
    return (scale if len(shape) == 1 else nn.Sequential(flatten, scale)), features
