"""From a config and a task to the networks of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator

from iql_torchrl import policies
from iql_torchrl.agent.make_encoder import FEATURES, Encoders, make_encoder, observed_task
from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig
from iql_torchrl.data.schema import field_of_space, leaf_spaces
from iql_torchrl.descriptions import describe_space, faulty_bounds
from iql_torchrl.networks import (
    ACTIVATIONS,
    Critic,
    DiscreteCritic,
    Flatten,
    OneHot,
    Standardise,
    StateValue,
)

__all__ = ["Networks", "make_networks"]


class Networks(NamedTuple):
    """The policy, a function that makes a critic, V, and the encoder that they share, or None."""

    actor: ProbabilisticActor
    critic: Callable[[], TensorDictModule]
    value: TensorDictModule
    encoder: TensorDictModule | None


def make_networks(config: IQLConfig, task: Task, encoders: Encoders) -> Networks:
    """The networks of a run as ``config`` says.

    Raises ``ValueError`` and ``TypeError`` as :func:`iql_torchrl.make_agent` does.
    """
    _check_actions(task.action_space)
    task = observed_task(config, task)
    place = partial(_place, config, task)
    shared = make_encoder(config, task, encoders)
    if shared is None:
        encoder = None
        keys, features, preprocess = _observation(config, task)
    else:
        encoder, features = place(shared[0]), shared[1]
        keys, preprocess = [FEATURES], nn.Identity
    action_spec = task.action_spec
    widths: dict[str, Any] = {
        "hidden": config.hidden,
        "activation": ACTIVATIONS[config.activation],
        "initialisation": config.initialisation,
    }
    if config.residual == "all":
        normed = {**widths, "residual": True}
    else:
        normed = {
            **widths,
            "layer_norm": config.layer_norm,
            "norm_after_activation": config.norm_after_activation,
        }
    discrete = isinstance(task.action_space, spaces.Discrete)
    name = _policy_name(config, task.action_space)
    options = {**widths, "dropout": config.dropout, "preprocess": preprocess()}
    options["residual"] = config.residual != "none"
    if discrete and task.masked:
        options["mask_key"] = "action_mask"
    if name == "flow":
        options["num_steps"] = config.flow_steps
    actor = getattr(policies, name)(features, action_spec, in_keys=keys, **options)

    def critic() -> TensorDictModule:
        if discrete:
            size = int(action_spec.space.n)
            net: nn.Module = DiscreteCritic(features, size, preprocess=preprocess(), **normed)
            return TensorDictModule(place(net), in_keys=keys, out_keys=["state_action_value"])
        net = Critic(features, action_spec.shape[-1], preprocess=preprocess(), **normed)
        return ValueOperator(place(net), in_keys=[*keys, "action"])

    value = ValueOperator(StateValue(features, preprocess=preprocess(), **normed), in_keys=keys)
    return Networks(place(actor), critic, place(value), encoder)


def _policy_name(config: IQLConfig, space: spaces.Space[Any]) -> str:
    """Name in :mod:`iql_torchrl.policies`; ``ValueError`` where it does not fit the actions."""
    discrete = isinstance(space, spaces.Discrete)
    name = ("categorical" if discrete else "gaussian") if config.policy == "auto" else config.policy
    if (name == "categorical") is not discrete:
        raise ValueError(
            f"policy is {name!r} and the actions are {describe_space(space)}: "
            "'categorical' is for Discrete actions, the others are for a Box. Choose policy='auto'."
        )
    if discrete and config.num_samples > 1:
        raise ValueError(
            f"num_samples is {config.num_samples} and the actions are "
            f"{describe_space(space)}; the best of several actions is for continuous "
            "ones. Choose num_samples=1."
        )
    return name


def _check_actions(space: spaces.Space[Any]) -> None:
    """Raise ``ValueError`` for actions that none of the policies here can choose."""
    if isinstance(space, spaces.Discrete):
        return
    if (
        not isinstance(space, spaces.Box)
        or not np.issubdtype(space.dtype, np.floating)
        or len(space.shape) != 1
        or space.shape == (0,)
    ):
        raise ValueError(
            f"the actions are {describe_space(space)}; make_agent supports Discrete, and Box of "
            "floats of shape (A,). For a Box of another shape pass dataset.flatten_actions(). "
            "Else wrap the environment and record the data with such actions (combinations of choices "
            "can be numbered from 0), or build the networks yourself and pass them to IQLLoss: README, "
            "'Your own modules'."
        )
    if faults := faulty_bounds(space.low, space.high):
        raise ValueError(
            f"the actions are {describe_space(space)}; {faults}. The policies need finite bounds, "
            "low < high. If the environment accepts a finite range that holds the logged actions, "
            "pass dataclasses.replace(dataset, action_space=gymnasium.spaces.Box(low, high))."
        )


def _place(config: IQLConfig, task: Task, module: Any) -> Any:
    """On the device and in the data's dtype, before the loss takes it: buffers stay afterwards."""
    module = module.to(torch.device(config.device))
    return module.double() if task.dtype is torch.float64 else module.float()


def _observation(
    config: IQLConfig, task: Task
) -> tuple[list[NestedKey], int, Callable[[], nn.Module]]:
    """Of vectors, or one category: keys to read, features they give, and a maker of the first layer."""
    space = task.observation_space
    if isinstance(space, spaces.Discrete):
        return ["observation"], int(space.n), partial(OneHot, int(space.n))
    statistics = task.statistics
    keys = sorted(task.observation_spec.keys(True, True), key=str)
    mean = torch.cat([statistics[key].mean for key in keys])
    std = torch.cat([statistics[key].std for key in keys])
    first: Callable[[], nn.Module]
    if config.standardise:
        first = partial(Standardise, mean, std)
    elif any(dtype.is_floating_point for dtype in _dtypes(task)):
        first = nn.Identity  # joined with floats, whole numbers become floats
    else:
        first = partial(Flatten, (len(mean),))
    return keys, len(mean), first


def _dtypes(task: Task) -> list[torch.dtype]:
    """In which the leaves of an observation are stored."""
    leaves = leaf_spaces(task.observation_space).items()
    return [field_of_space(space, task.dtype, key).dtype for key, space in leaves]
