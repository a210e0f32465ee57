"""From a task to the encoder that policy, critics and V share, where observations need one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig
from iql_torchrl.data import DatasetSummary
from iql_torchrl.data.encodings import is_image, is_vector, usual_encoder
from iql_torchrl.data.schema import Key, dotted, field_of_space, leaf_spaces
from iql_torchrl.data.stacked import stacked_space, stacked_statistics
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import (
    HISTORY_MASK,
    CausalTransformer,
    ImageEncoder,
    JoinedEncoders,
    LSTMEncoder,
)

__all__ = ["FEATURES", "Encoders", "check_images", "leaf_name", "make_encoder", "observed_task"]

Encoders = Mapping[str, nn.Module]
FEATURES = "features"  # what the encoder writes


def leaf_name(key: Key) -> str:
    """The name of an observation's leaf: ``"camera"``, ``"arm.speed"``, or ``"observation"``."""
    return dotted(key[1:]) or "observation"


def make_encoder(
    config: IQLConfig, task: Task, encoders: Encoders
) -> tuple[TensorDictModule, int] | None:
    """The shared encoder of all leaves and its number of features; None where none is needed.

    Vectors of numbers, and one category alone, are read by each network itself. ``encoders``:
    modules of the user's by leaf, in place of the usual ones.

    Raises ``ValueError`` on a name that is no leaf, and an encoder whose output is no vector;
    ``TypeError`` on one that is no module.
    """
    leaves = leaf_spaces(task.observation_space)
    _check_names(encoders, leaves)
    windows = reads_windows(config)
    alone = isinstance(task.observation_space, spaces.Discrete)
    if (
        not encoders
        and not windows
        and (alone or all(is_vector(space) for space in leaves.values()))
    ):
        return None
    parts, total = [], 0
    for key, space in leaves.items():
        own = encoders.get(leaf_name(key))
        if own is not None:
            module, size = own, _features_of(leaf_name(key), own, task, key, space)
        elif is_image(space):
            module, size = _image_encoder(config, space), config.image_features
        else:
            statistics = task.statistics.get(key[0] if len(key) == 1 else key)
            module, size = usual_encoder(space, statistics, standardise=config.standardise)
        parts.append(module)
        total += size
    keys = [key[0] if len(key) == 1 else key for key in leaves]
    joined: nn.Module = JoinedEncoders(parts)
    if windows:
        joined = _sequence(config, joined, total)
        keys, total = [*keys, HISTORY_MASK], config.history_features
    return TensorDictModule(joined, in_keys=keys, out_keys=[FEATURES]), total


def reads_windows(config: IQLConfig) -> bool:
    """Whether the encoder reads windows of observations and their masks."""
    return config.history > 1 and config.history_encoder != "stack"


def observed_task(config: IQLConfig, task: Task) -> Task:
    """The task as the networks see it: with stacked frames where the config says so."""
    if config.history == 1 or reads_windows(config):
        return task
    return replace(
        task,
        observation_space=stacked_space(task.observation_space, config.history),
        statistics=stacked_statistics(task.statistics, config.history),
    )


def _sequence(config: IQLConfig, each: nn.Module, features: int) -> nn.Module:
    if config.history_encoder == "lstm":
        return LSTMEncoder(features, config.history_features, preprocess=each)
    return CausalTransformer(
        features, config.history_features, length=config.history, preprocess=each
    )


def check_images(dataset: DatasetSummary, encoders: Encoders) -> None:
    """Raise ``ValueError`` on float images outside [0, 1]."""
    for key, space in leaf_spaces(dataset.observation_space).items():
        if leaf_name(key) in encoders or not is_image(space) or space.dtype == np.uint8:
            continue
        for side in (key, ("next", *key)):
            low, high = dataset.range_of(side)
            if low < 0 or high > 1:
                raise ValueError(
                    f"{dotted(side)} are images of floats between {low:g} and {high:g}; expected "
                    "uint8, or floats in [0, 1]. Divide by 255, or store uint8."
                )


def _check_names(encoders: Encoders, leaves: Mapping[Key, gym.Space[Any]]) -> None:
    names = [leaf_name(key) for key in leaves]
    for name, module in encoders.items():
        if name not in names:
            raise ValueError(
                f"encoders names {name!r}, which is no part of the observations; they hold "
                f"{', '.join(names)}."
            )
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"encoders[{name!r}] is {type(module).__name__}; expected a torch module that turns "
                "(B, *shape) into features (B, F)."
            )


def _image_encoder(config: IQLConfig, space: gym.Space[Any]) -> ImageEncoder:
    return ImageEncoder(space.shape or (), config.image_features, kind=config.image_encoder)


def _features_of(name: str, module: nn.Module, task: Task, key: Key, space: gym.Space[Any]) -> int:
    """Width of a user's encoder, from its output for two observations of zeros."""
    field = field_of_space(space, task.dtype, key)
    like = next(module.parameters(), None)
    zeros = torch.zeros(
        2, *field.shape, dtype=field.dtype, device=None if like is None else like.device
    )
    training = module.training
    try:
        with torch.no_grad():
            out = module.eval()(zeros)
    except Exception as error:  # of any kind: it is the user's module
        raise ValueError(
            f"encoders[{name!r}], a {type(module).__name__}, fails on {describe_space(space)} as a "
            f"batch of shape {tuple(zeros.shape)}, {zeros.dtype}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        module.train(training)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"encoders[{name!r}], a {type(module).__name__}, gives {found} for a batch of shape "
            f"{tuple(zeros.shape)}; expected features (2, F)."
        )
    return int(out.shape[1])
