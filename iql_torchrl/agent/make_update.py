"""From a config and networks to the loss, the optimizer and the update of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from gymnasium import spaces
from torch.optim.lr_scheduler import LambdaLR
from torchrl.objectives import SoftUpdate

from iql_torchrl.agent.make_networks import Networks
from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig, loss_knobs
from iql_torchrl.losses import DiscreteIQLLoss, ImplicitQLoss, IQLLoss
from iql_torchrl.update.step import IQLStep

__all__ = [
    "LEARNING_RATES",
    "ends_before",
    "make_loss",
    "make_optimizer",
    "make_step",
    "rate_factors",
]

# by policy, the loss that regresses it on the logged actions, where that is not log_prob
REGRESSIONS = {"deterministic": "mse", "flow": "flow"}
# by network, the field of IQLConfig
LEARNING_RATES = {
    "actor": "actor_lr",
    "qvalue": "critic_lr",
    "value": "value_lr",
    "encoder": "encoder_lr",
}


def make_loss(config: IQLConfig, task: Task, networks: Networks) -> ImplicitQLoss:
    discrete = isinstance(task.action_space, spaces.Discrete)
    kind: type[ImplicitQLoss] = DiscreteIQLLoss if discrete else IQLLoss
    loss = kind(
        networks.actor,
        networks.critic,
        networks.value,
        num_qvalue_nets=config.num_critics,
        encoder_network=networks.encoder,
        actor_objective=_actor_objective(config),
        diagnostics=True,
        **{name: getattr(config, name) for name in loss_knobs(type(config))},
    )
    loss.make_value_estimator(gamma=config.discount)
    return loss


def _actor_objective(config: IQLConfig) -> str:
    if config.actor_objective != "auto":
        return config.actor_objective
    return REGRESSIONS.get(config.policy, "log_prob")


def make_optimizer(
    config: IQLConfig, loss: ImplicitQLoss
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    named = list(loss.named_parameters())
    groups = [
        {
            "params": [p for n, p in named if n.startswith(f"{network}_network")],
            "lr": getattr(config, field),
        }
        for network, field in LEARNING_RATES.items()
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, weight_decay=config.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.Adam(groups, fused=True)

    return optimizer, LambdaLR(optimizer, rate_factors(config, len(groups)))


def make_step(
    config: IQLConfig,
    loss: ImplicitQLoss,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
) -> IQLStep:
    """One eager update of ``loss`` as ``config`` says."""
    return IQLStep(
        loss,
        optimizer,
        SoftUpdate(loss, tau=config.polyak),
        order=config.order,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler=scheduler,
        precision=config.precision,
    )


def rate_factors(config: IQLConfig, groups: int = 3) -> list[Callable[[int], float]]:
    """What multiplies the learning rates of policy, critics, V and encoder after each update.

    ``groups``: 3, or 4 with an encoder that has parameters.
    """
    cosine = partial(_cosine, updates=config.updates, steps=config.schedule_steps)
    falling = {"constant": (), "cosine_actor": ("actor",), "cosine": LEARNING_RATES}[
        config.schedule
    ]
    names = list(LEARNING_RATES)[:groups]
    return [cosine if network in falling else _constant for network in names]


def ends_before(config: IQLConfig, updates: int) -> str | None:
    """A sentence where the schedule of ``config`` ends before ``updates``; else None."""
    if config.schedule == "constant" or updates <= config.updates:
        return None
    return (
        f"schedule is {config.schedule!r} over updates={config.updates} of the config, and the run "
        f"makes {updates} updates: the scheduled learning rates are 0 after update {config.updates}. "
        f"Give the config updates={updates}, or schedule='constant'."
    )


def _cosine(update: int, *, updates: int, steps: int | None) -> float:
    """From 1 to 0 over ``updates``, in ``steps`` equal intervals of constant value if given."""
    done = min(update, updates)
    fraction = done / updates if steps is None else done * steps // updates / steps
    return 0.5 * (1 + math.cos(math.pi * fraction))


def _constant(_: int) -> float:
    return 1.0
