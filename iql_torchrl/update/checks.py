"""Checks of the arguments of an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchrl.objectives.utils import TargetNetUpdater

from iql_torchrl.config import IQLConfig, config_settings
from iql_torchrl.losses import IQLLoss


def check_settings(**values: object) -> None:
    """Raise ``ValueError`` on a value that the config of a run does not allow either."""
    for name, value in values.items():
        config_settings(IQLConfig)[name].plain(value)


def check_parts(
    loss: IQLLoss,
    optimizer: Optimizer,
    updater: TargetNetUpdater | None,
    schedulers: Sequence[LRScheduler],
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on parts that do not belong together."""
    if isinstance(loss, DistributedDataParallel):
        raise TypeError(
            f"loss is a DistributedDataParallel around {type(loss.module).__name__}, whose gradients "
            "this step would not reduce across ranks. Pass the loss itself (its attribute .module), "
            "and make the step data parallel with iql_torchrl.distributed.data_parallel(step, ranks)."
        )
    if not isinstance(loss, IQLLoss):
        raise TypeError(
            f"loss is {type(loss).__module__}.{type(loss).__name__}; pass an IQLLoss or a "
            "DiscreteIQLLoss of iql_torchrl."
        )
    if loss.reduction == "none":
        raise ValueError("the loss has reduction='none'; a step needs scalars: 'mean' or 'sum'.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}; expected a torch.optim.Optimizer. Join several "
            "with torchrl.objectives.group_optimizers."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer is LBFGS, which evaluates the loss many times a step; use Adam.")
    if updater is not None and not isinstance(updater, TargetNetUpdater):
        raise TypeError(
            f"target_updater is {type(updater).__name__}; expected SoftUpdate(loss, tau=0.005) or "
            "HardUpdate(loss) from torchrl.objectives."
        )
    if updater is not None and updater.loss_module is not loss:
        raise ValueError("target_updater follows another loss; build it from the loss given here.")
    check_optimizer(loss, optimizer)
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
        raise TypeError(
            "lr_scheduler is a ReduceLROnPlateau, which steps on a score: step it yourself after an "
            "evaluation."
        )


def check_optimizer(loss: IQLLoss, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` where the optimizer lacks a parameter that requires a gradient."""
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in loss.named_parameters() if p.requires_grad and id(p) not in given]
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} of the loss's parameters, the first {missing[0]!r}; "
            "build it from loss.parameters(), or freeze them with requires_grad_(False)."
        )


def check_traceable(loss: IQLLoss) -> None:
    """Raise ``TypeError`` on a recurrent layer of torch, which ``torch.compile`` cannot trace."""
    for name in loss.network_names:
        for path, module in getattr(loss, name).named_modules():
            if isinstance(module, nn.RNNBase):
                raise TypeError(
                    f"{name} has a torch.nn.{type(module).__name__} at {path!r}, which torch.compile "
                    "cannot trace; use networks.LSTMEncoder over dataset.windows(length), or call the "
                    "step itself, without compiled and captured."
                )
