"""Checks that the configs and losses of a population differ only in weights and per-run settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives.value import TD0Estimator

from iql_torchrl.config import IQLConfig, knobs
from iql_torchrl.losses import OPTIONS, DiscreteIQLLoss, ImplicitQLoss, IQLLoss
from iql_torchrl.losses.parameters import ENCODER, NETWORKS
from iql_torchrl.networks import Critic
from iql_torchrl.networks.direct import is_head_and_distribution, writes
from iql_torchrl.networks.evaluation import ELEMENTWISE, is_stackable
from iql_torchrl.policies import FlowPolicy
from iql_torchrl.private_apis import children_of, has_hooks

__all__ = ["check_alike", "check_configs", "per_run_names", "perceptron_keys", "shared_names"]


def per_run_names(loss: ImplicitQLoss) -> tuple[str, ...]:
    """Attributes in which the runs may differ."""
    return tuple(name for name, knob in loss.knobs.items() if knob.per_run)


def shared_names(loss: ImplicitQLoss) -> tuple[str, ...]:
    """Attributes that must be equal in all runs."""
    return *OPTIONS, *(name for name, knob in loss.knobs.items() if not knob.per_run)


def check_alike(losses: Sequence[ImplicitQLoss]) -> None:
    first = losses[0]
    for number, loss in enumerate(losses):
        if type(loss) not in (IQLLoss, DiscreteIQLLoss):
            raise TypeError(
                f"losses[{number}] is a {type(loss).__name__}; expected IQLLoss or DiscreteIQLLoss."
            )
        if type(loss) is not type(first):
            raise ValueError(
                f"losses[{number}] is a {type(loss).__name__}, the first another kind."
            )
        for name in (*shared_names(first), "tensor_keys"):
            _check_same(number, name, getattr(first, name), getattr(loss, name))
        estimators = first.value_estimator, loss.value_estimator
        if type(estimators[1]) is not TD0Estimator or estimators[1].average_rewards:
            raise ValueError(f"losses[{number}] does not use TD(0); a population does.")
        if estimators[1].gamma.numel() != 1:
            raise ValueError(
                f"losses[{number}] has several discounts; a run of a population has one."
            )
        _check_same(number, "value_estimator's keys", *(e.tensor_keys for e in estimators))
        _check_networks(number, first, loss, NETWORKS)
        _check_encoders(number, first, loss)
    for name, choice in (
        ("actor_objective", "log_prob"),
        ("value_objective", "expectile"),
        ("advantage_weight", "exponential"),
    ):
        if callable(getattr(first, name)):
            raise ValueError(f"{name} is a function, which sees one run; use {choice!r}.")
    flow = type(first.actor_network) is FlowPolicy
    if not flow and not is_head_and_distribution(first.actor_network):
        raise ValueError(
            "actor_network must be one module and one distribution (ProbabilisticActor), or a flow "
            "policy."
        )
    keys = first.tensor_keys.state_action_value, first.tensor_keys.value
    for name, key in zip(NETWORKS[1:], keys, strict=True):
        if not writes(getattr(first, name), key):
            raise ValueError(
                f"{name} must be one plain module whose one out-key is {key!r}, ValueOperator; its "
                f"out_keys are {getattr(first, name).out_keys}."
            )


def _check_encoders(number: int, first: ImplicitQLoss, loss: ImplicitQLoss) -> None:
    """Raise ``ValueError`` unless all runs have one encoder, which nothing trains, or none has one."""
    _check_same(
        number, "encoder_network", *(type(x.encoder_network).__name__ for x in (first, loss))
    )
    if loss.encoder_network is None:
        return
    names = [name for name, _ in loss.named_parameters() if name.startswith(ENCODER)]
    if names:
        raise ValueError(
            f"losses[{number}]'s encoder_network has parameters ({names[0]}); the runs of a population "
            "share the encoder, so it must have none, as those of vectors and categories. Train runs "
            "with images one by one."
        )
    mine, theirs = (dict(x.encoder_network_params.items(True, True)) for x in (first, loss))
    _check_same(number, "encoder_network's entries", list(mine), list(theirs))
    _check_same(number, "encoder_network", str(first.encoder_network), str(loss.encoder_network))
    for key, leaf in mine.items():
        if not torch.equal(leaf, theirs[key]):
            raise ValueError(
                f"encoder_network's {key} differs in losses[{number}] and the first; a population "
                "shares the data, so statistics must be the same."
            )


def check_configs(configs: Sequence[IQLConfig]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``configs`` are those of one population."""
    if isinstance(configs, IQLConfig):
        raise TypeError("configs is one IQLConfig; expected a sequence of them, one per run.")
    if not isinstance(configs, Sequence) and configs is not None:
        raise TypeError(f"configs is {type(configs).__name__}; expected a sequence of IQLConfigs.")
    if not configs:
        raise ValueError("configs is empty; a population has at least one run.")
    for number, config in enumerate(configs):
        if not isinstance(config, IQLConfig):
            raise TypeError(f"configs[{number}] is {type(config).__name__}; expected an IQLConfig.")
        if type(config) is not type(configs[0]):
            raise TypeError(
                f"configs[{number}] is {type(config).__name__} and configs[0] is "
                f"{type(configs[0]).__name__}; the configs of a population have one class."
            )
        described = knobs(type(config))
        for name, knob in described.items():
            first, other = getattr(configs[0], name), getattr(config, name)
            if not knob.per_run and first != other:
                may_differ = [name for name, each in described.items() if each.per_run]
                raise ValueError(
                    f"{name} is {other} in configs[{number}] and {first} in configs[0]; runs of a "
                    f"population may differ in {', '.join(may_differ)}. Train one population for "
                    "each."
                )


def perceptron_keys(name: str, network: nn.Module) -> set[NestedKey]:
    """Keys of the parameters inside the network's perceptrons.

    Raises ``ValueError`` on what cannot be stacked: anything but this package's networks and
    policies, and plain Sequentials of Linear, LayerNorm, Dropout and element-wise activations.
    """
    perceptrons = {p: m for p, m in network.named_modules() if is_stackable(m)}
    inside = {part for module in perceptrons.values() for part in module.modules()}
    for path, module in _causes_first(network):
        if has_hooks(module) or not (module in inside or _is_transparent(module)):
            raise ValueError(
                f"{name} holds {path!r}, a {type(module).__name__}, which cannot be stacked; train "
                "its runs one by one, or build it from iql_torchrl.networks, iql_torchrl.policies "
                "or plain Sequentials of Linear, LayerNorm, Dropout and element-wise activations."
            )
        if type(module) is Critic and any(True for _ in module.preprocess.parameters()):
            raise ValueError(
                f"{name}'s {path}.preprocess has parameters, and a critic joins what it gives with "
                "the action, which has none; let the critic see the observations as they are."
            )
    return {
        tuple(f"{path}.{key}".removeprefix(".").split("."))
        for path, module in perceptrons.items()
        for key, _ in module.named_parameters()
    }


def _check_networks(number: int, first: Any, loss: Any, names: Sequence[str]) -> None:
    """Raise ``ValueError`` where networks of ``losses[number]`` differ from the first loss's.

    They may differ in weights alone, and none may share parameters with another.
    """
    leaves = [leaf for name in names for leaf in _leaves(loss, name).values()]
    trained = [id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)]
    if loss.has_trunk or len(set(trained)) < len(trained):
        raise ValueError(
            f"losses[{number}]'s networks share parameters, a trunk or tied layers; in a population "
            "every network has its own."
        )
    for name in names:
        mine, theirs = (_leaves(x, name) for x in (first, loss))
        for key in {**mine, **theirs}:
            shapes = [tuple(x[key].shape) if key in x else None for x in (theirs, mine)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name}'s {key} has shape {shapes[0]} in losses[{number}] and {shapes[1]} in "
                    "the first: networks of different shapes are not stacked. Train one population "
                    "for each shape."
                )
            other = "frozen parameter" if isinstance(mine[key], nn.Parameter) else "buffer"
            roles = ["trained" if x[key].requires_grad else other for x in (mine, theirs)]
            _check_same(number, f"{name}'s {key}", *roles)
        for one, another in zip_longest(*(_outline(getattr(x, name)) for x in (first, loss))):
            _check_same(number, f"a module of {name}", one, another)


def _check_same(number: int, name: str, first: object, other: object) -> None:
    """Raise ``ValueError`` where ``name`` of ``losses[number]`` differs from the first loss's."""
    if first != other:
        raise ValueError(f"{name} is {other!r} in losses[{number}] and {first!r} in the first.")


def _leaves(loss: Any, name: str) -> dict[str, Tensor]:
    return {str(key): leaf for key, leaf in children_of(loss)[f"{name}_params"].items(True, True)}


def _outline(network: nn.Module) -> list[tuple[str, ...]]:
    """Paths, classes, settings and keys of a network's modules: all of it except the weights."""
    names = ("in_keys", "out_keys", "distribution_class")
    return [
        (path, f"{type(m).__name__}({m.extra_repr()})", *(str(getattr(m, n, "")) for n in names))
        for path, m in network.named_modules()
    ]


def _is_transparent(module: nn.Module) -> bool:
    """Whether it only joins its parts, treats every number for itself, or is of this package."""
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    wraps = package in ("tensordict", "torchrl") and isinstance(
        module, TensorDictModuleBase | ProbabilisticTensorDictModule
    )
    return wraps or package == "iql_torchrl" or kind in (nn.Sequential, nn.ModuleList, *ELEMENTWISE)


def _causes_first(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with Linear and LayerNorm last: another part keeps their Sequential from stacking."""
    kinds = (nn.LayerNorm, nn.Linear)
    return sorted(
        network.named_modules(),
        key=lambda item: kinds.index(type(item[1])) if type(item[1]) in kinds else -1,
    )
