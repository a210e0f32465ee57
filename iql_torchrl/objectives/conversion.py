"""From the user's networks to TorchRL's parameters and targets, and loading them."""

from __future__ import annotations

import warnings
from typing import Any

from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule

from iql_torchrl.host import TARGET_CRITICS, children_of
from iql_torchrl.objectives.averages import add_average, tie_average
from iql_torchrl.objectives.encoding import ENCODER, add_encoder, check_encoder
from iql_torchrl.objectives.ensembles import (
    Critics,
    SharedLeaves,
    initialise_critics,
    list_critics,
)

__all__ = ["NETWORKS", "check_form", "convert_networks", "network_names", "scalar_mode"]

NETWORKS = ("actor_network", "qvalue_network", "value_network")
"""Attributes of a loss; their parameters are ``<name>_params`` and ``target_<name>_params``."""


def network_names(loss: Any) -> tuple[str, ...]:
    """:data:`NETWORKS`, and the encoder's name where the loss has one."""
    return NETWORKS if loss.encoder_network is None else (*NETWORKS, ENCODER)


def convert_networks(
    loss: Any, actor: nn.Module, critics: Critics, value: nn.Module, *, separate_losses: bool
) -> SharedLeaves:
    """Register the networks' parameters and the critics' targets on ``loss``, as TorchRL does.

    Returns the record of parameters that networks share. With ``separate_losses`` parameters shared
    with the actor belong to the actor alone.
    """
    listed = list_critics(critics, loss.num_qvalue_nets)
    modules = listed if isinstance(listed, list) else [listed]
    _check_networks(actor_network=[actor], qvalue_network=modules, value_network=[value])
    others = {"actor_network": [actor], "qvalue_network": modules, "value_network": [value]}
    check_encoder(loss, others)
    add_encoder(loss)
    shared = SharedLeaves(detach=separate_losses)
    owners: dict[str, nn.Module] = {"actor_network": actor, "value_network": value}
    if separate_losses:
        shared.find_trunk("value_network", [value], {"actor_network": actor})
    if separate_losses or len(modules) > 1:
        shared.find_trunk("qvalue_network", modules, owners)
    of_actor = list(actor.parameters())
    loss.convert_to_functional(actor, "actor_network")
    if loss.actor_ema:
        add_average(loss)
    loss.convert_to_functional(
        value, "value_network", compare_against=of_actor if separate_losses else None
    )
    loss.convert_to_functional(
        listed,
        "qvalue_network",
        None if loss.num_qvalue_nets == 1 else loss.num_qvalue_nets,
        create_target_params=True,
        compare_against=[*of_actor, *value.parameters()] if separate_losses else None,
    )
    if loss.num_qvalue_nets > 1 and not isinstance(listed, list):
        target = children_of(loss)[TARGET_CRITICS]
        initialise_critics(loss.qvalue_network_params, target, listed)
    shared.install(loss, "value_network", [value])
    shared.install(loss, "qvalue_network", modules)
    loss.optional_keys = _recurrent_keys(actor, value, *modules)
    loss.register_load_state_dict_pre_hook(_before_load)
    loss.register_load_state_dict_post_hook(_after_load)
    return shared


def check_form(
    num_qvalue_nets: object, value_network: object, reduction: str | None, gamma: object
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on arguments that no loss accepts."""
    if gamma is not None:
        raise TypeError(
            f"gamma is {gamma!r}; the discount belongs to the value estimator: call "
            f"loss.make_value_estimator(gamma={gamma!r}) after building the loss."
        )
    if isinstance(num_qvalue_nets, bool) or not isinstance(num_qvalue_nets, int):
        raise TypeError(f"num_qvalue_nets is {num_qvalue_nets!r}; it must be a whole number >= 1.")
    if num_qvalue_nets < 1:
        raise ValueError(f"num_qvalue_nets is {num_qvalue_nets}; at least one critic is needed.")
    if value_network is None:
        raise ValueError(
            "value_network is None: IQL needs a state-value network V(s), for the targets of "
            "the critics and for the policy's advantages. Pass a module that writes "
            "'state_value'."
        )
    if reduction not in (None, "", "mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; choose 'mean', 'sum' or 'none'.")


def scalar_mode(loss: Any, mode: str | None, stacklevel: int) -> str | None:
    """``scalar_output_mode`` as it applies to ``loss``; warns where it must be chosen."""
    if mode not in (None, "exclude", "non_tensor"):
        raise ValueError(f"scalar_output_mode is {mode!r}; choose 'exclude', 'non_tensor' or None.")
    if loss.reduction != "none" or mode is not None:
        return mode
    warnings.warn(
        f"{type(loss).__name__} with reduction='none' returns losses of the batch's shape, beside "
        "which a scalar (entropy, diagnostics) has no place: they are left out. Pass "
        "scalar_output_mode='exclude' to say so, or 'non_tensor' to keep them as non-tensor data.",
        UserWarning,
        stacklevel=stacklevel,
    )
    return "exclude"


def _check_networks(**networks: list[Any]) -> None:
    for name, modules in networks.items():
        for module in modules:
            if not isinstance(module, nn.Module) or not hasattr(module, "in_keys"):
                raise TypeError(
                    f"{name} is {type(module).__name__}; it must be a TensorDictModule: wrap a "
                    "plain network as TensorDictModule(network, in_keys=[...], out_keys=[...])."
                )


def _recurrent_keys(*networks: nn.Module) -> set[NestedKey]:
    """Keys that recurrent modules start from when a batch holds them and do without otherwise."""
    cells = [m for net in networks for m in net.modules() if isinstance(m, LSTMModule | GRUModule)]
    states = {unravel_key(key) for cell in cells for key in cell.in_keys[1:] if key != "is_init"}
    return states | {unravel_key(("next", key)) for key in states}


def _before_load(loss: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    loss.shared.untie(loss)
    if loss.num_qvalue_nets == 1:
        _squeeze_single_critic(loss, state_dict, prefix)


def _after_load(loss: Any, _: Any) -> None:
    loss.shared.tie(loss)
    tie_average(loss)
    loss.forget_evaluator()


def _squeeze_single_critic(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Accept checkpoints of older TorchRL losses, where a single critic had a leading dimension."""
    for key, current in module.state_dict().items():
        stored = state_dict.get(prefix + key)
        is_critic = key.removeprefix("target_").startswith("qvalue_network_params.")
        if is_critic and stored is not None and stored.shape == (1, *current.shape):
            state_dict[prefix + key] = stored.squeeze(0)
