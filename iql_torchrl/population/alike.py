"""Checks that the configs and losses of a population differ only in weights and per-run settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchrl.objectives.value import TD0Estimator

from iql_torchrl.config import IQLConfig, knobs
from iql_torchrl.fast_networks.detect import is_head_and_distribution, writes
from iql_torchrl.fast_networks.stacked import (
    check_networks,
    check_same,
)
from iql_torchrl.objectives.conversion import NETWORKS
from iql_torchrl.objectives.discrete import DiscreteIQLLoss
from iql_torchrl.objectives.encoding import ENCODER
from iql_torchrl.objectives.implicit import OPTIONS, ImplicitQLoss
from iql_torchrl.objectives.iql import IQLLoss
from iql_torchrl.policies import FlowPolicy

__all__ = ["check_alike", "check_configs", "per_run_names", "shared_names"]


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
            check_same(number, name, getattr(first, name), getattr(loss, name))
        estimators = first.value_estimator, loss.value_estimator
        if type(estimators[1]) is not TD0Estimator or estimators[1].average_rewards:
            raise ValueError(f"losses[{number}] does not use TD(0); a population does.")
        if estimators[1].gamma.numel() != 1:
            raise ValueError(
                f"losses[{number}] has several discounts; a run of a population has one."
            )
        check_same(number, "value_estimator's keys", *(e.tensor_keys for e in estimators))
        check_networks(number, first, loss, NETWORKS)
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
    check_same(
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
    check_same(number, "encoder_network's entries", list(mine), list(theirs))
    check_same(number, "encoder_network", str(first.encoder_network), str(loss.encoder_network))
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
