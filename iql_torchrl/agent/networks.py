"""From a config and a task to the networks of a run, and the encoder that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, TensorSpec
from torchrl.modules import ValueOperator

from iql_torchrl import networks, policies
from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig
from iql_torchrl.data import DatasetSummary
from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.schema import Key, dotted
from iql_torchrl.data.spaces import (
    is_image,
    is_vector,
    stacked_space,
    stacked_statistics,
    usual_encoder,
)
from iql_torchrl.descriptions import describe_space, faulty_bounds
from iql_torchrl.evaluation.acting import as_in_evaluation, policy_device

Encoders = Mapping[str, nn.Module]
FEATURES = "features"  # what the encoder writes


def make_networks(
    config: IQLConfig, task: Task, encoders: Encoders
) -> tuple[Any, Callable[[], TensorDictModule], ValueOperator, TensorDictModule | None]:
    """The policy, a function that makes a critic, V, and the encoder that they share, or None."""
    _check_actions(config, task.action_space)
    if config.history > 1 and config.history_encoder == "stack":  # as the networks see it
        task = replace(
            task,
            observation_space=stacked_space(task.observation_space, config.history),
            statistics=stacked_statistics(task.statistics, config.history),
        )
    encoder, keys, features, preprocess = _first_layers(config, task, encoders)
    space, spec = task.action_space, task.action_spec
    if config.action_chunk > 1:
        low, high = (each.repeat(config.action_chunk) for each in (spec.space.low, spec.space.high))
        spec = Bounded(low, high, low.shape, dtype=spec.dtype)
    widths = {
        "hidden": config.hidden,
        "activation": networks.ACTIVATIONS[config.activation],
        "initialisation": config.initialisation,
    }
    norm = {"layer_norm": config.layer_norm, "norm_after_activation": config.norm_after_activation}
    values = {**widths, **({"residual": True} if config.residual == "all" else norm)}

    def place(module: Any) -> Any:
        # before the loss takes it: buffers stay where they are afterwards
        return module.to(torch.device(config.device)).to(task.dtype)

    def critic() -> TensorDictModule:
        kind: Any = networks.Critic
        if isinstance(space, spaces.Discrete):
            kind, size, read = networks.DiscreteCritic, int(space.n), keys
        else:
            size, read = spec.shape[-1], [*keys, "action"]
        net = kind(features, size, preprocess=preprocess(), **values)
        return ValueOperator(place(net), in_keys=read, out_keys=["state_action_value"])

    options = {**widths, "in_keys": keys, "preprocess": preprocess()}
    actor = _make_policy(config, task, features, spec, options)
    value = networks.StateValue(features, preprocess=preprocess(), **values)
    shared = None if encoder is None else place(encoder)
    return place(actor), critic, ValueOperator(place(value), in_keys=keys), shared


def _make_policy(
    config: IQLConfig, task: Task, features: int, spec: TensorSpec, options: dict[str, Any]
) -> Any:
    """The policy that ``config`` names, for actions of ``spec``; ``options`` are of all policies."""
    options = {**options, "dropout": config.dropout, "residual": config.residual != "none"}
    name: str = config.policy
    if name == "auto":
        name = "categorical" if isinstance(task.action_space, spaces.Discrete) else "gaussian"
    if name == "categorical" and task.masked:
        options["mask_key"] = "action_mask"
    if name == "flow":
        options["num_steps"] = config.flow_steps
        if config.actor_objective == "conditioned_flow":
            options |= {"conditioned": True, "guidance": config.guidance}
    return getattr(policies, name)(features, spec, **options)


def check_images(dataset: DatasetSummary, encoders: Encoders) -> None:
    """Raise ``ValueError`` on float images outside [0, 1]."""
    for key, space in leaf_spaces(dataset.observation_space).items():
        if _leaf_name(key) in encoders or not is_image(space) or space.dtype == np.uint8:
            continue
        for side in (key, ("next", *key)):
            low, high = dataset.range_of(side)
            if low < 0 or high > 1:
                raise ValueError(
                    f"{dotted(side)} are images of floats between {low:g} and {high:g}; expected "
                    "uint8, or floats in [0, 1]. Divide by 255, or store uint8."
                )


def _check_actions(config: IQLConfig, space: gym.Space[Any]) -> None:
    """Raise ``ValueError`` for actions that no policy here, or not the config's, can choose."""
    described = f"the actions are {describe_space(space)}"
    discrete = isinstance(space, spaces.Discrete)
    vector = is_vector(space) and np.issubdtype(space.dtype, np.floating) and space.shape != (0,)
    faults = faulty_bounds(space.low, space.high) if isinstance(space, spaces.Box) else ""
    if not discrete and (faults or not vector):
        raise ValueError(
            f"{described}; {faults and f'{faults}. '}make_agent supports Discrete, and Box of floats "
            "of shape (A,) with finite bounds, low <= high. For a Box of another shape pass "
            "dataset.flatten_actions(); where the environment accepts a finite range, "
            "dataclasses.replace(dataset, action_space=gymnasium.spaces.Box(low, high)) with one that "
            "holds the logged actions. Else record other actions (combinations of choices can be "
            "numbered from 0), or pass networks of your own to IQLLoss: README, 'Your own modules'."
        )
    if config.policy != "auto" and (config.policy == "categorical") is not discrete:
        raise ValueError(
            f"policy is {config.policy!r} and {described}: 'categorical' is for Discrete actions, the "
            "others are for a Box. Choose policy='auto'."
        )
    if discrete and config.action_chunk > 1:
        raise ValueError(
            f"action_chunk is {config.action_chunk} and {described}; chunks are of continuous actions, "
            "as sequences of discrete ones would need a value each. Choose action_chunk=1."
        )
    if discrete and config.num_samples > 1:
        raise ValueError(
            f"num_samples is {config.num_samples} and {described}; the best of several actions is "
            "for continuous ones. Choose num_samples=1."
        )


def _first_layers(
    config: IQLConfig, task: Task, encoders: Encoders
) -> tuple[TensorDictModule | None, list[NestedKey], int, Callable[[], nn.Module]]:
    """The shared encoder, if any; the keys that the networks read, their features, a first layer."""
    space, leaves = task.observation_space, leaf_spaces(task.observation_space)
    windows = config.history > 1 and config.history_encoder != "stack"
    vectors = all(map(is_vector, leaves.values()))
    if encoders or windows or not (vectors or isinstance(space, spaces.Discrete)):
        encoder, size = _encoder(config, task, encoders, windows)
        return encoder, [FEATURES], size, nn.Identity
    if isinstance(space, spaces.Discrete):
        return None, ["observation"], int(space.n), partial(networks.OneHot, int(space.n))
    keys = sorted(task.observation_spec.keys(True, True), key=str)
    logged = [task.statistics[key] for key in keys]
    mean, std = torch.cat([s.mean for s in logged]), torch.cat([s.std for s in logged])
    first: Callable[[], nn.Module] = partial(networks.Standardise, mean, std)
    if not config.standardise:  # joined with floats, integers become floats
        floats = any(task.observation_spec[key].dtype.is_floating_point for key in keys)
        first = nn.Identity if floats else partial(networks.Flatten, (len(mean),))
    return None, keys, len(mean), first


def _encoder(
    config: IQLConfig, task: Task, encoders: Encoders, windows: bool
) -> tuple[TensorDictModule, int]:
    """The encoder of all leaves, of their sequence with ``windows``; and its number of features."""
    leaves = leaf_spaces(task.observation_space)
    names = [_leaf_name(key) for key in leaves]
    for name, module in encoders.items():
        if name not in names:
            raise ValueError(
                f"encoders names {name!r}, which is not a part of the observations; they hold "
                f"{', '.join(names)}."
            )
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"encoders[{name!r}] is {type(module).__name__}; expected a torch module that turns "
                "(B, *shape) into features (B, F)."
            )
    keys: list[NestedKey] = [key[0] if len(key) == 1 else key for key in leaves]
    parts, total = [], 0
    for name, read, (key, space) in zip(names, keys, leaves.items(), strict=True):
        if name in encoders:
            module, size = encoders[name], _features_of(name, encoders[name], task, key, space)
        elif is_image(space):
            size = config.image_features
            module = networks.ImageEncoder(space.shape or (), size, kind=config.image_encoder)
        else:
            logged = task.statistics.get(read)
            module, size = usual_encoder(space, logged, standardise=config.standardise)
        parts.append(module)
        total += size
    joined: nn.Module = networks.JoinedEncoders(parts)
    if windows:
        kind: Any = networks.LSTMEncoder
        if config.history_encoder == "transformer":
            kind = partial(networks.CausalTransformer, length=config.history)
        joined = kind(total, config.history_features, preprocess=joined)
        total, keys = config.history_features, [*keys, networks.HISTORY_MASK]
    return TensorDictModule(joined, in_keys=keys, out_keys=[FEATURES]), total


def _features_of(name: str, module: nn.Module, task: Task, key: Key, space: gym.Space[Any]) -> int:
    """Width of a user's encoder, from its output for two observations of zeros."""
    device = policy_device(module, None)
    zeros = task.observation_spec[key].zero((2,)).to(device)
    try:
        with as_in_evaluation(module, device):
            given = tuple(module(zeros).shape)
        if len(given) != 2 or given[0] != 2:
            raise ValueError(f"it gives {given}")
    except Exception as error:  # of any kind: it is the user's module
        raise ValueError(
            f"encoders[{name!r}], a {type(module).__name__}, does not turn {describe_space(space)}, a "
            f"batch of shape {tuple(zeros.shape)}, {zeros.dtype}, into features (2, F): "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    return given[1]


def _leaf_name(key: Key) -> str:
    """The name of an observation's leaf: ``"camera"``, ``"arm.speed"``, or ``"observation"``."""
    return dotted(key[1:]) or "observation"
