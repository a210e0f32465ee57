"""Spaces of observations in other forms: stacked, as features; and checks of their categories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from iql_torchrl import networks
from iql_torchrl.data.scaling import ObservationStatistics
from iql_torchrl.data.schema import Key
from iql_torchrl.descriptions import describe_space

KINDS = "expected Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of them."
SMALLEST_IMAGE = 8  # pixels; what is smaller is a table of numbers

Name = TypeVar("Name")
Limits: TypeAlias = dict[Key, tuple[int, ...]]


def stacked_space(space: gym.Space[Any], length: int) -> gym.Space[Any]:
    """The space of ``length`` stacked observations of ``space``, as tables hold them.

    ``networks.stack_frames`` gives the shapes; categories count from zero. A Discrete becomes a
    MultiDiscrete. With ``length=1``: ``space`` itself. Raises ``ValueError`` on another space than
    Box, Discrete, MultiDiscrete, MultiBinary or Dict of them.
    """
    if length == 1:
        return space
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(k, stacked_space(v, length)) for k, v in space.spaces.items()])
    if isinstance(space, spaces.Box):
        low, high = (_stacked(torch.as_tensor(b), length).numpy() for b in (space.low, space.high))
        return spaces.Box(low, high, low.shape, space.dtype.type)
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary(_stacked(torch.zeros(space.shape), length).shape)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        counts = space.n if isinstance(space, spaces.Discrete) else space.nvec
        return spaces.MultiDiscrete(_stacked(torch.as_tensor(counts), length).numpy())
    raise ValueError(f"{describe_space(space)} cannot be stacked; {KINDS}")


def stacked_statistics(
    statistics: Mapping[Name, ObservationStatistics], length: int
) -> dict[Name, ObservationStatistics]:
    """Every frame of a stack has the statistics of one frame."""
    return {key: one.map(lambda part: _stacked(part, length)) for key, one in statistics.items()}


def _stacked(values: Tensor, length: int) -> Tensor:
    frames = values.expand(1, length, *values.shape)
    return networks.stack_frames(frames, values.ndim).squeeze(0).clone()


def is_vector(space: gym.Space[Any]) -> bool:
    """True if observations are ``(F,)`` numbers, which networks read without an encoder."""
    return isinstance(space, spaces.Box | spaces.MultiBinary) and len(space.shape) == 1


def is_image(space: gym.Space[Any]) -> bool:
    """True for a space of images, or of stacks of images.

    A Box of three dimensions, at least 8 x 8 beside the channels, of uint8, or of floats in [0, 1]; or
    of four dimensions of which the last three are so: ``(k, H, W, C)``, as Gymnasium's
    ``FrameStackObservation`` gives.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) not in (3, 4):
        return False
    if sorted(space.shape[-3:])[1] < SMALLEST_IMAGE:
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
        return networks.OneHot(int(space.n)), int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        counts = [int(n) for n in space.nvec.flatten()]
        return networks.OneHots(counts, space.nvec.shape), sum(counts)
    if not isinstance(space, spaces.Box | spaces.MultiBinary):
        raise ValueError(f"observations are {describe_space(space)}; {KINDS}")
    features = spaces.flatdim(space)
    flatten = networks.Flatten(space.shape)
    if isinstance(space, spaces.MultiBinary) or statistics is None or not standardise:
        return flatten, features
    scale = networks.Standardise(statistics.mean.flatten(), statistics.std.flatten())
    return (scale if is_vector(space) else nn.Sequential(flatten, scale)), features


def category_limits(loss: Any) -> Limits:
    """How many categories the networks of a loss read, by key on both sides of ``next``.

    One number for each column of an entry.
    """
    limits: Limits = {}
    parts = loss.encoder_network, loss.actor_network, loss.qvalue_network, loss.value_network
    for module in (module for part in parts if part is not None for module in part.modules()):
        if not isinstance(module, TensorDictModule):
            continue
        first = getattr(module.module, "preprocess", module.module)
        encoders = first.encoders if type(first) is networks.JoinedEncoders else [first]
        for name, encoder in zip(module.in_keys, encoders, strict=False):
            # Not isinstance: a subclass may read other categories.
            if type(encoder) in (networks.OneHot, networks.OneHots):
                key = (name,) if isinstance(name, str) else tuple(name)
                counts = getattr(encoder, "counts", None) or (encoder.num_classes,)
                limits |= {key: counts, ("next", *key): counts}
    return limits


def check_categories(column: Callable[[Key], Tensor | None], limits: Limits) -> None:
    """Raise ``ValueError`` on a category of ``column(key)`` outside of ``[0, limit)``.

    Compiled code cannot check categories without a crash.
    """
    for key, counts in limits.items():
        values = column(key)
        if values is None or not values.numel():
            continue
        for one, count in zip(values.reshape(-1, len(counts)).unbind(-1), counts, strict=True):
            low, high = (int(value) for value in one.aminmax())
            if low < 0 or high >= count:
                raise ValueError(
                    f"{'.'.join(key)} has category {low if low < 0 else high}; expected integers "
                    f"from 0 to {count - 1}, which networks.OneHot({count}) reads. Build the networks "
                    "for as many categories as the data hold."
                )
