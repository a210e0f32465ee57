"""Which networks and wrappers the fast evaluation knows, tested by class."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey, unravel_key
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import ProbabilisticActor, SafeModule, SafeProbabilisticModule, ValueOperator

from iql_torchrl import networks, policies
from iql_torchrl.fast_networks.perceptron import Category, Perceptron
from iql_torchrl.host import children_of, has_hooks, has_private_tables, reads_positions

__all__ = [
    "BODIES",
    "OWN",
    "WRAPPERS",
    "is_head_and_distribution",
    "is_known",
    "is_single",
    "keeps_buffers",
    "pick_first",
    "writes",
]

SINGLE = (TensorDictModule, SafeModule, ValueOperator)
WRAPPERS = (
    *SINGLE,
    ProbabilisticActor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    SafeProbabilisticModule,
    TensorDictSequential,
    policies.FlowPolicy,
)
BODIES = (networks.Critic, networks.DiscreteCritic)
"""Networks that may do something between their input and their perceptron."""
OWN = (
    *BODIES,
    networks.Flatten,
    networks.ImageEncoder,
    networks.JoinedEncoders,
    networks.MLP,
    networks.OneHot,
    networks.OneHots,
    networks.Standardise,
    networks.StateValue,
    *policies.HEADS,
    policies.FlowHead,
)
"""Classes of this package: what their code does is known."""
OF_TORCH = {c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, nn.Module)}
KNOWN = {*OF_TORCH, *OWN, *WRAPPERS, TorchRLMLP}
# Modules that write to their buffers when they are evaluated in training mode.
NORMALISING = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def is_known(module: nn.Module) -> bool:
    """Whether a copy of the module behaves as the module does, apart from its mode."""
    return type(module) in KNOWN and has_private_tables(module) and not has_hooks(module)


def is_single(network: Any) -> bool:
    """Whether it is one plain module with one out-key."""
    return _is_plain(network) and len(network.out_keys) == 1


def _is_plain(network: Any) -> bool:
    """Whether it calls one module with the entries of its keys, in their order."""
    return (
        type(network) in SINGLE
        and isinstance(network.module, nn.Module)
        and reads_positions(network)
        and not (network.method or network.method_kwargs)
    )


def writes(network: Any, key: NestedKey) -> bool:
    """Whether it is single and its output goes where the loss reads it."""
    return is_single(network) and unravel_key(network.out_keys[0]) == unravel_key(key)


def keeps_buffers(network: nn.Module) -> bool:
    """Whether evaluating the network leaves its buffers as they are."""
    return not any(isinstance(module, NORMALISING) for module in network.modules())


def is_head_and_distribution(actor: Any) -> bool:
    """Whether it is one plain module followed by one distribution, a usual ProbabilisticActor."""
    parts = list(actor) if isinstance(actor, TensorDictSequential) else []
    return (
        len(parts) == 2
        and _is_plain(parts[0])
        and type(parts[1]) in (ProbabilisticTensorDictModule, SafeProbabilisticModule)
        and not actor.return_composite
    )


def pick_first(module: nn.Module) -> None:
    """Let a :class:`Perceptron` behind a OneHot read the categories themselves.

    Not in a ``Critic`` or a ``FlowHead``, which join the one-hot vector with the action.
    """
    parts = children_of(module)
    first, body = parts.get("preprocess"), parts.get("mlp")
    if type(module) in (networks.Critic, policies.FlowHead):
        return
    if type(first) is networks.OneHot and isinstance(body, Perceptron):
        parts["preprocess"], body.picks = Category(), True
