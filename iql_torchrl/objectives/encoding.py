"""The encoder of a loss: one network that gives features, which actor, critics and V read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import nn

from iql_torchrl.host import LIVE_CRITICS, TARGET_CRITICS, keeps_batch_statistics
from iql_torchrl.objectives.batch import Batch
from iql_torchrl.objectives.draws import IMAGE_SHIFT, NEXT_IMAGE_SHIFT, Draw

__all__ = [
    "ENCODER",
    "add_encoder",
    "check_encoder",
    "inputs_of",
    "observed_keys",
    "shift_draws",
    "trains_encoder_alone",
]

ENCODER = "encoder_network"


def check_encoder(loss: Any, networks: Mapping[str, Sequence[Any]]) -> None:
    """Raise ``TypeError`` or ``ValueError`` where the encoder does not fit the other networks."""
    encoder: Any = loss.encoder_network
    pixels = loss.random_shift
    if encoder is None:
        if pixels:
            raise ValueError(
                f"random_shift is {pixels} and there is no encoder_network; it moves the images that "
                "an encoder reads. Pass encoder_network=, or random_shift=0."
            )
        return
    is_module = isinstance(encoder, nn.Module)
    if not is_module or not hasattr(encoder, "in_keys"):
        raise TypeError(
            f"encoder_network is {type(encoder).__name__}; it must be a TensorDictModule: "
            "TensorDictModule(network, in_keys=[...], out_keys=['features'])."
        )
    for module in encoder.modules():
        if keeps_batch_statistics(module):  # the target's would change too
            raise ValueError(
                f"encoder_network holds a {type(module).__name__}, which keeps statistics of the "
                "batches, and is evaluated with the weights of the target too. Use LayerNorm or "
                "GroupNorm."
            )
    side = getattr(getattr(encoder, "module", None), "shortest_side", None)
    if pixels and side is None:
        raise ValueError(
            f"random_shift is {pixels} and encoder_network has no images to move; it must be a "
            "TensorDictModule of networks.JoinedEncoders with a networks.ImageEncoder in it."
        )
    if pixels and pixels >= side:
        raise ValueError(
            f"random_shift is {pixels} pixels and an image has a side of {side}, so it could be "
            "moved out of sight; DrQ uses 4 for 84 x 84."
        )
    own = {id(parameter) for parameter in encoder.parameters()}
    written = {unravel_key(key) for key in encoder.out_keys}
    read: set[NestedKey] = set()
    for name, modules in networks.items():
        for module in modules:
            read |= {unravel_key(key) for key in module.in_keys}
            if any(id(parameter) in own for parameter in module.parameters()):
                raise ValueError(
                    f"{name} holds parameters of encoder_network; let it read the encoder's output "
                    f"{list(encoder.out_keys)} instead: the loss evaluates the encoder itself."
                )
    if not written & read:
        raise ValueError(
            f"encoder_network writes {list(encoder.out_keys)}, which no other network reads; they "
            f"read {sorted(map(str, read))}. Give them in_keys={list(encoder.out_keys)}."
        )


def add_encoder(loss: Any) -> None:
    """Register the encoder's parameters, and their targets, as TorchRL's losses do."""
    encoder = loss.encoder_network
    if encoder is not None:
        del loss.encoder_network
        loss.convert_to_functional(encoder, ENCODER, create_target_params=True)


def observed_keys(loss: Any, keys: Sequence[NestedKey]) -> list[NestedKey]:
    """The entries of a batch behind ``keys``, which networks read: for features what gives them."""
    if loss.encoder_network is None:
        return list(keys)
    written = {unravel_key(key) for key in loss.encoder_network.out_keys}
    rest = [key for key in keys if unravel_key(key) not in written]
    return rest if len(rest) == len(keys) else [*rest, *loss.encoder_network.in_keys]


def shift_draws(loss: Any, shape: tuple[int, ...]) -> dict[str, Draw]:
    """Random numbers that move the images of a batch of ``shape``, before and after the step."""
    if not loss.random_shift:
        return {}
    draw = Draw((*shape, 2), normal=False, entries=2)
    return {IMAGE_SHIFT: draw, NEXT_IMAGE_SHIFT: draw}


def trains_encoder_alone(loss: Any) -> bool:
    """Whether only the critics' loss trains the encoder."""
    return bool(loss.encoder_gradient == "critics")


def inputs_of(loss: Any, batch: Batch, critics: str | None = None) -> TensorDictBase:
    """What networks read: the batch's entries, with the encoder's features where there is one.

    ``critics``: the parameters of the critics that read them; None for the policy and V. Target
    critics get features of the target encoder. A gradient reaches the encoder through the live
    critics, and with ``encoder_gradient="all"`` through the policy and V. Features are evaluated once
    for a batch and kept in it.
    """
    if loss.encoder_network is None:
        return batch.data
    if critics == TARGET_CRITICS:
        features = _features(loss, batch, target=True)
    else:
        features = _features(loss, batch, target=False)
        learns = critics == LIVE_CRITICS or (critics is None and not trains_encoder_alone(loss))
        features = features if learns else features.detach()
    return batch.data.copy().update(features)


def _features(loss: Any, batch: Batch, *, target: bool) -> TensorDictBase:
    kept = batch.features
    gradient = torch.is_grad_enabled() and not target
    for key in ((target, True), (target, False)):
        if key in kept and (key[1] or not gradient):
            return kept[key]
    data = batch.data.select(*loss.encoder_network.in_keys, strict=False)
    if loss.random_shift:
        keys = list(loss.encoder_network.in_keys)
        moved = loss.encoder_network.module.shifted(
            [data.get(key) for key in keys], batch.draws[IMAGE_SHIFT], loss.random_shift
        )
        for key, observation in zip(keys, moved, strict=True):
            data.set(key, observation)
    with torch.set_grad_enabled(gradient):
        kept[(target, gradient)] = loss.evaluator.features(loss, data, target)
    return kept[(target, gradient)]
