"""From a config and a dataset to the parts of a run; nothing here that twenty lines could not do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gymnasium import spaces
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import policies
from iql_torchrl.config import IQLConfig
from iql_torchrl.data import OfflineDataset
from iql_torchrl.networks import Critic, DiscreteCritic, OneHot, Standardise, StateValue
from iql_torchrl.objectives import DiscreteIQLLoss, ImplicitQLoss, IQLLoss
from iql_torchrl.step import IQLStep, compiled

__all__ = ["Agent", "make_agent"]

NETWORKS = ("actor", "qvalue", "value")


@dataclass(frozen=True)
class Agent:
    """What a run consists of: each part is an ordinary torch or TorchRL object.

    ``policy`` is the actor, for ``evaluate`` and for TorchRL environments; ``step(batch)`` makes
    one update.
    """

    config: IQLConfig
    actor: ProbabilisticActor
    loss: ImplicitQLoss
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    step: IQLStep

    @property
    def policy(self) -> ProbabilisticActor:
        return self.actor


def make_agent(config: IQLConfig, dataset: OfflineDataset) -> Agent:
    """Networks, loss, optimizer and step for ``dataset``'s observations and actions.

    Draws the initial weights from ``config.seed`` without touching the caller's random state.

    Raises ``ValueError`` when the observations are no flat numbers or single category (use
    ``load_dataset(concatenate=...)``, or write your own networks), or the policy does not fit the
    actions.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        actor, critic, value = _networks(config, dataset)
        loss = _loss(config, dataset, actor, critic, value)
    optimizer, scheduler = _optimizer(config, loss)
    step = IQLStep(
        loss,
        optimizer,
        SoftUpdate(loss, tau=config.polyak),
        order=config.order,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler=scheduler,
    )
    return Agent(
        config, actor, loss, optimizer, scheduler, compiled(step) if config.compile else step
    )


def _networks(
    config: IQLConfig, dataset: OfflineDataset
) -> tuple[ProbabilisticActor, Callable[[], TensorDictModule], TensorDictModule]:
    keys, features, preprocess = _observation(config, dataset)
    device = torch.device(config.device)  # before the loss takes the parameters, buffers stay
    action_spec = dataset.action_spec
    widths = {"hidden": config.hidden}
    normed: dict[str, Any] = {**widths, "layer_norm": config.layer_norm}
    discrete = isinstance(dataset.action_space, spaces.Discrete)
    name = ("categorical" if discrete else "gaussian") if config.policy == "auto" else config.policy
    if (name == "categorical") is not discrete:
        raise ValueError(f"policy is {name!r} and the actions are {dataset.action_space}.")
    options: dict[str, Any] = {**widths, "dropout": config.dropout, "preprocess": preprocess()}
    if discrete and "action_mask" in dataset.transitions:
        options["mask_key"] = "action_mask"
    actor = getattr(policies, name)(features, action_spec, in_keys=keys, **options)

    def critic() -> TensorDictModule:
        if discrete:
            size = int(action_spec.space.n)
            net: nn.Module = DiscreteCritic(features, size, preprocess=preprocess(), **normed)
            net = net.to(device)
            return TensorDictModule(net, in_keys=keys, out_keys=["state_action_value"])
        net = Critic(features, action_spec.shape[-1], preprocess=preprocess(), **normed)
        return ValueOperator(net.to(device), in_keys=[*keys, "action"])

    value = ValueOperator(StateValue(features, preprocess=preprocess(), **normed), in_keys=keys)
    return actor.to(device), critic, value.to(device)


def _observation(
    config: IQLConfig, dataset: OfflineDataset
) -> tuple[list[NestedKey], int, Callable[[], nn.Module]]:
    """Keys to read, features they give, and a maker of the first layer."""
    space = dataset.observation_space
    if isinstance(space, spaces.Discrete):
        return ["observation"], int(space.n), partial(OneHot, int(space.n))
    statistics = dataset.statistics
    leaves = list(dataset.observation_spec.keys(True, True))
    if set(leaves) != set(statistics) or any(s.mean.ndim != 1 for s in statistics.values()):
        raise ValueError(
            f"observations are {space}; make_agent wants vectors of numbers, or one category. "
            "Build the networks yourself and pass them to IQLLoss: README, 'Your own parts'."
        )
    keys = sorted(leaves, key=str)
    mean = torch.cat([statistics[key].mean for key in keys])
    std = torch.cat([statistics[key].std for key in keys])
    first = partial(Standardise, mean, std) if config.standardise else nn.Identity
    return keys, len(mean), first


def _loss(
    config: IQLConfig,
    dataset: OfflineDataset,
    actor: ProbabilisticActor,
    critic: Callable[[], TensorDictModule],
    value: TensorDictModule,
) -> ImplicitQLoss:
    discrete = isinstance(dataset.action_space, spaces.Discrete)
    kind: type[ImplicitQLoss] = DiscreteIQLLoss if discrete else IQLLoss
    loss = kind(
        actor,
        critic,
        value,
        num_qvalue_nets=config.num_critics,
        loss_function=config.loss_function,
        temperature=config.temperature,
        expectile=config.expectile,
        max_weight=config.max_weight,
        value_objective=config.value_objective,
        actor_objective="mse" if config.policy == "deterministic" else "log_prob",
        diagnostics=True,
    )
    loss.make_value_estimator(gamma=config.discount)
    return loss


def _optimizer(config: IQLConfig, loss: ImplicitQLoss) -> tuple[torch.optim.Optimizer, LambdaLR]:
    rates = dict(zip(NETWORKS, (config.actor_lr, config.critic_lr, config.value_lr), strict=True))
    named = list(loss.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.startswith(f"{net}_network")], "lr": rate}
        for net, rate in rates.items()
    ]
    if config.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, weight_decay=config.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.Adam(groups, fused=True)

    cosine = partial(_cosine, updates=config.updates)
    falling = {"constant": (), "cosine_actor": ("actor",), "cosine": NETWORKS}[config.schedule]
    return optimizer, LambdaLR(optimizer, [cosine if n in falling else _constant for n in NETWORKS])


def _cosine(update: int, *, updates: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, update / updates)))


def _constant(_: int) -> float:
    return 1.0
