"""Target networks: which tensors a ``SoftUpdate`` moves, and the Polyak step that moves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from iql_torchrl.host import children_of
from iql_torchrl.objectives.conversion import network_names

__all__ = ["Followed", "followed_tensors", "polyak_step"]


class Followed(NamedTuple):
    """Live tensors and, in the same order, the target tensors that follow them."""

    live: list[Tensor]
    targets: list[Tensor]


def followed_tensors(updater: TargetNetUpdater | None) -> Followed:
    """The tensors that a ``SoftUpdate`` moves; none for any other updater.

    Buffers are left out: those of the target critics are the live ones.
    """
    followed = Followed([], [])
    if updater is None or type(updater) is not SoftUpdate:
        return followed
    loss = updater.loss_module
    for name in network_names(loss):
        targets = children_of(loss).get(f"target_{name}_params")
        if targets is not None:
            for key, parameter in getattr(loss, f"{name}_params").items(True, True):
                if isinstance(parameter, nn.Parameter):
                    followed.live.append(parameter)
                    followed.targets.append(targets.get(key))
    return followed


def polyak_step(targets: Sequence[Tensor], live: Sequence[Tensor], eps: float) -> None:
    """``target = eps * target + (1 - eps) * live``, in place, as TorchRL's ``SoftUpdate``."""
    if torch.compiler.is_compiling():  # on CUDA one kernel fewer than the foreach form
        for target, parameter in zip(targets, live, strict=True):
            target.data.lerp_(parameter.data, 1 - eps)
    elif targets:
        get_ema_multi_avg_fn(eps)(list(targets), list(live), 0)
