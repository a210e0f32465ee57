"""The moving average of a policy's weights, and the policy that acts with it."""

from __future__ import annotations

import copy
from typing import Any

from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from iql_torchrl.host import children_of

__all__ = ["AVERAGE", "add_average", "average_pairs", "start_average", "tie_average"]

AVERAGE = "average_actor_network_params"  # not target_..., which TorchRL's updaters would move


def add_average(loss: Any) -> None:
    """Give ``loss`` a copy of the actor's parameters, and ``averaged_actor``, which holds them.

    Parameters are averaged; buffers are the live ones. The average starts at the weights as they are.
    The copy is part of the loss's state, and not of its parameters.
    """
    params = loss.actor_network_params
    trained = [key for key, leaf in params.items(True, True) if isinstance(leaf, nn.Parameter)]
    average = params.data.select(*trained).clone()
    setattr(loss, AVERAGE, TensorDictParams(average, no_convert=True))
    actor = copy.deepcopy(loss.actor_network)
    loss.__dict__["averaged_actor"] = actor.requires_grad_(False)  # no submodule, as the networks
    tie_average(loss)


def average_pairs(loss: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The actor's parameters, and in the same order their averages; empty without averages."""
    average = children_of(loss).get(AVERAGE)
    if average is None:
        return [], []
    pairs = [(loss.actor_network_params.get(key), leaf) for key, leaf in average.items(True, True)]
    return [live for live, _ in pairs], [leaf for _, leaf in pairs]


def start_average(loss: Any) -> None:
    """Start the average again at the weights as they are."""
    live, averages = average_pairs(loss)
    for parameter, average in zip(live, averages, strict=True):
        average.data.copy_(parameter.data)


def tie_average(loss: Any) -> None:
    """Let ``averaged_actor`` use the storage of the average, which may be other tensors now."""
    actor = loss.__dict__.get("averaged_actor")
    if actor is None:
        return
    average = children_of(loss)[AVERAGE]
    for key, live in loss.actor_network_params.items(True, True):
        *path, name = key if isinstance(key, tuple) else (key,)
        module = actor.get_submodule(".".join(path))
        if isinstance(live, nn.Parameter):
            shared = nn.Parameter(average.get(key).data, requires_grad=False)
            setattr(module, name, shared)
        else:
            setattr(module, name, live.data)
