"""The losses of P runs as one loss over stacked parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictParams
from torch import nn

from iql_torchrl.losses import ImplicitQLoss
from iql_torchrl.losses.parameters import AVERAGE, ENCODER, NETWORKS
from iql_torchrl.networks import AroundPerceptron
from iql_torchrl.networks.evaluation import Direct
from iql_torchrl.networks.recognition import is_stackable
from iql_torchrl.private_apis import children_of, has_hooks


def stack_losses(losses: Sequence[ImplicitQLoss]) -> ImplicitQLoss:
    """One loss of the runs' class with parameters ``(P, ...)``; its losses and scalars are ``(P,)``.

    ``losses``: one per run, of one config but for its ``per_run`` settings, on one dataset; copied.
    Batches are ``(B,)``, the same for every run, or ``(P, B)``. Random tensors are drawn for each
    run, all from one generator, so a run gets other numbers than if it were trained alone. The
    discount and the ``per_run`` knobs (``expectile``, ``temperature``, ...) become buffers ``(P, 1)``.
    No parameter is shared, so the sum of the P losses trains each run as if it were alone.

    Raises ``ValueError`` on networks that cannot be stacked and on an encoder with parameters.
    """
    first = losses[0]
    if names := [name for name, _ in first.named_parameters() if name.startswith(ENCODER)]:
        raise ValueError(
            f"encoder_network has parameters ({names[0]}); the runs of a population share the encoder, "
            "so it must have none, as those of vectors and categories. Train runs with images one by "
            "one."
        )
    loss = copy.deepcopy(first)
    loss.members, loss.averaged_actor = len(losses), None
    for name in NETWORKS:
        inside = _perceptron_keys(name, getattr(first, name))
        for attribute in (f"{name}_params", f"target_{name}_params", f"average_{name}_params"):
            if attribute in children_of(first):
                setattr(loss, attribute, _stacked(losses, attribute, inside))
    like = next(first.parameters())
    for name, knob in first.knobs.items():
        if knob.per_run:
            delattr(loss, name)  # the first run's number; the buffer has the numbers of all runs
            values = torch.tensor([float(getattr(x, name)) for x in losses], dtype=torch.float64)
            loss.register_buffer(name, values.to(like).unsqueeze(-1), persistent=False)
    discounts = torch.stack([x.value_estimator.gamma.reshape(()) for x in losses])
    loss.register_buffer("discount", discounts.to(like.device).unsqueeze(-1), persistent=False)
    loss.put_into_networks()
    networks = loss.networks
    known = {
        "actor_network": networks.head is not None,
        "qvalue_network": all(isinstance(x, Direct) for x in networks.critics.values()),
        "value_network": isinstance(networks.value, Direct),
    }
    if unknown := [name for name in NETWORKS if not known[name]]:
        raise ValueError(
            f"{unknown[0]} cannot be stacked: it must be one plain module that shares no parameters, "
            "with the same statistics in all runs. Train its runs one by one."
        )
    return loss


def _stacked(
    losses: Sequence[ImplicitQLoss], attribute: str, inside: set[NestedKey]
) -> TensorDictParams:
    """The losses' parameters ``attribute``, ``(P, ...)`` in each entry.

    Parameters outside of perceptrons get a dimension of size 1 for the batch, ``(P, 1, ...)``.
    """
    each: list[Any] = [children_of(loss)[attribute] for loss in losses]
    stacked: Any = torch.stack([params.data for params in each])
    stacked = stacked.contiguous().unlock_()
    for key, leaf in list(each[0].items(True, True)):
        values = stacked.get(key)
        trained = isinstance(leaf, nn.Parameter)
        if key not in inside and (trained or attribute == AVERAGE):
            values = values.unsqueeze(1)
        stacked.set(key, nn.Parameter(values, leaf.requires_grad) if trained else values)
    return TensorDictParams(stacked, no_convert=True)


def write_member(stacked: ImplicitQLoss, number: int, loss: ImplicitQLoss) -> None:
    """Copy run ``number``'s weights, targets too, into an ordinary loss of the same shapes."""
    with torch.no_grad():
        for name, params in children_of(stacked).items():
            of_encoder = name.removeprefix("target_").startswith(ENCODER)
            if isinstance(params, TensorDictParams) and not of_encoder:
                for key, leaf in children_of(loss)[name].items(True, True):
                    leaf.data.copy_(params.get(key)[number].reshape(leaf.shape))


def _perceptron_keys(name: str, network: nn.Module) -> set[NestedKey]:
    """Keys of the parameters inside the network's perceptrons.

    Raises ``ValueError`` where a module that is neither part of one nor a network around one has
    parameters of its own, or something hooks on to a module.
    """
    inside: set[NestedKey] = set()
    parts: set[nn.Module] = set()
    for path, module in network.named_modules():
        if is_stackable(module):
            parts |= set(module.modules())
            above = tuple(path.split(".")) if path else ()
            inside |= {(*above, *entry.split(".")) for entry, _ in module.named_parameters()}
    for path, module in network.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        stacks = module in parts or isinstance(module, AroundPerceptron) or not own
        if has_hooks(module) or not stacks:
            raise ValueError(
                f"{name} holds {path!r}, a {type(module).__name__}, which cannot be stacked; train "
                "its runs one by one, or build it from perceptrons without residual blocks."
            )
    return inside
