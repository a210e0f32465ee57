"""Whether networks and arguments fit a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import nn

from iql_torchrl.config import check_choice
from iql_torchrl.private_apis import keeps_batch_statistics

FLOWS: tuple[Any, ...] = ("flow", "conditioned_flow")  # objectives that train flows


def check_form(
    num_qvalue_nets: object,
    value_network: object,
    reduction: str | None,
    scalar_output_mode: str | None,
    gamma: object,
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
    check_choice("reduction", reduction or "mean", ("mean", "sum", "none"))
    if scalar_output_mode not in (None, "exclude", "non_tensor"):
        raise ValueError(
            f"scalar_output_mode is {scalar_output_mode!r}; choose 'exclude', 'non_tensor' or None."
        )


def check_actor(actor: Any, objective: object) -> None:
    """Raise ``TypeError`` where the policy cannot be trained with the objective."""
    if callable(objective):
        return
    name, is_flow = type(actor).__name__, hasattr(actor, "velocity")
    conditioned = getattr(actor, "conditioned", False)
    fitting = "conditioned_flow" if conditioned else "flow"
    if objective in FLOWS and not is_flow:
        raise TypeError(
            f"actor_network is {name}, which has no velocity; actor_objective={objective!r} needs "
            "policies.flow(...)."
        )
    if objective in FLOWS and objective != fitting:
        raise TypeError(
            f"actor_objective is {objective!r} and actor_network is a {name} with "
            f"conditioned={conditioned}; this objective needs policies.flow(..., "
            f"conditioned={not conditioned})."
        )
    if is_flow and objective not in FLOWS:
        raise TypeError(
            f"actor_objective is {objective!r} and actor_network is a {name}, which has no density; "
            f"train it with actor_objective={fitting!r}."
        )
    if objective == "log_prob" and not hasattr(actor, "get_dist"):
        raise TypeError(
            f"actor_network is {name}, which has no distribution (get_dist); expected a TorchRL "
            "ProbabilisticActor, or actor_objective='mse' for a policy that gives the action itself."
        )


def check_encoder(encoder: Any, networks: Mapping[str, Sequence[Any]], pixels: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` where the encoder does not fit the other networks.

    ``pixels``: by how many images are moved before the encoder reads them.
    """
    if encoder is None:
        if pixels:
            raise ValueError(
                f"random_shift is {pixels} and there is no encoder_network; it moves the images that "
                "an encoder reads. Pass encoder_network=, or random_shift=0."
            )
        return
    is_module = isinstance(encoder, nn.Module) and hasattr(encoder, "in_keys")
    if not is_module:
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
    side: Any = getattr(getattr(encoder, "module", None), "shortest_side", None)
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
