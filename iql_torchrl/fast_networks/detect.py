"""Networks of a loss bound to its parameters for good, where their structure allows it.

TorchRL's losses swap parameters into a network at every evaluation, and map over critics. Copies
of known networks that hold the loss's own parameters need neither; in these copies perceptrons are
:class:`~iql_torchrl.fast_networks.dense.Dense`. Other networks are evaluated as TorchRL does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import ProbabilisticActor, SafeModule, SafeProbabilisticModule, ValueOperator

from iql_torchrl import networks
from iql_torchrl.fast_networks.dense import Category, Dense, linear_layers
from iql_torchrl.host import children_of, has_hooks, reads_positions

__all__ = [
    "BoundNetworks",
    "DirectActor",
    "is_head_and_distribution",
    "is_known",
    "is_single",
    "pick_first",
    "writes",
]

Evaluate = Callable[[TensorDictBase], Tensor]
SINGLE = (TensorDictModule, SafeModule, ValueOperator)
WRAPPERS = (
    *SINGLE,
    ProbabilisticActor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    SafeProbabilisticModule,
    TensorDictSequential,
)
OURS = (networks.Critic, networks.DiscreteCritic, networks.OneHot, networks.Standardise)
# What treats every row for itself and draws nothing.
BY_ROW = (*OURS[2:], networks.StateValue, Category, Dense, nn.Identity)
# What changes its own buffers when it is evaluated in training mode.
NORMALISING = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


class BoundNetworks:
    """Evaluations of a loss's networks; ``None`` or absent where there is no short way.

    ``value`` and ``critics[id(params)]`` map a TensorDict to raw outputs, ``(*B, n)`` and
    ``(K, *B, n)``; ``actor`` is a TensorDictModule.
    """

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self._modes: list[tuple[nn.Module, nn.Module]] = []
        mixed = {name for name, *_ in loss._shared.trunk}
        self.value: _Direct | None = None
        self.critics: dict[int, Evaluate] = {}
        if "value_network" not in mixed:
            clone = self._bind(loss.value_network, loss.value_network_params)
            if clone is not None and writes(clone, loss.tensor_keys.value):
                self.value = _Direct(clone)
        self._actor: Any = self._bind(loss.actor_network, loss.actor_network_params)
        if self._actor is not None and is_head_and_distribution(self._actor):
            self._actor = DirectActor(self._actor)
        critic = loss.qvalue_network
        named = writes(critic, loss.tensor_keys.state_action_value)
        if "qvalue_network" not in mixed and named and _leaves_no_trace(critic):
            for name in ("qvalue_network_params", "target_qvalue_network_params"):
                params = children_of(loss)[name]
                clone = self._bind(critic, params, stacked=loss.num_qvalue_nets > 1)
                if clone is not None:
                    lone = loss.num_qvalue_nets == 1
                    self.critics[id(params)] = _Lone(clone) if lone else _Direct(clone)

    @property
    def actor(self) -> Any:
        """None where an objective of the user's own may do anything with the network."""
        return None if callable(self._loss.actor_objective) else self._actor

    def follow_modes(self) -> None:
        """Training or evaluation mode as the loss's own networks have it."""
        for original, clone in self._modes:
            if clone.training is not original.training:
                clone.training = original.training

    def _bind(self, network: nn.Module, params: Any, stacked: bool = False) -> nn.Module | None:
        if not all(is_known(module) for module in network.modules()):
            return None
        clone = copy.deepcopy(network)
        params.to_module(clone)
        if stacked and not _unstack_around(clone):
            return None
        originals = dict(network.named_modules())
        _condense(clone)
        self._modes += [(originals[name], m) for name, m in clone.named_modules()]
        return clone


class _Direct:
    """``network`` called with the entries of its keys, past TensorDict."""

    def __init__(self, network: Any) -> None:
        self.module, self.in_keys = network.module, network.in_keys
        self.by_row = all(type(m) in BY_ROW for m in self.module.modules())

    def __call__(self, data: TensorDictBase) -> Tensor:
        value: Tensor = self.module(*[data.get(key) for key in self.in_keys])
        return value

    def twice(self, first: TensorDictBase, second: TensorDictBase) -> Sequence[Tensor]:
        """Outputs of two batches of one shape from a single evaluation; only where ``by_row``."""
        inputs = [torch.stack([first.get(key), second.get(key)]) for key in self.in_keys]
        value: Tensor = self.module(*inputs)
        return value.unbind()


class _Lone(_Direct):
    """The same for one critic, ``(*B, n)`` -> ``(1, *B, n)``."""

    def __call__(self, data: TensorDictBase) -> Tensor:
        return super().__call__(data).unsqueeze(0)


class DirectActor:
    """An actor of one plain module and one distribution, its distribution found past TensorDict."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._head, self._last = actor[0], actor[1]

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        out: TensorDictBase = self._actor(data)
        return out

    def head(self, data: TensorDictBase) -> Any:
        """What the module before the distribution gives."""
        return self._head.module(*[data.get(key) for key in self._head.in_keys])

    def get_dist(self, data: TensorDictBase) -> Any:
        out = self.head(data)
        values = (out,) if isinstance(out, Tensor) else out
        found = dict(zip(self._head.out_keys, values, strict=True))
        for key in self._last.in_keys:
            if key not in found:  # an action mask, which runs of a population may share
                mask, like = data.get(key), values[0]
                found[key] = mask.expand(*like.shape[: like.ndim - mask.ndim], *mask.shape)
        return self._last.get_dist(found)  # which asks it for ``get`` alone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


def is_known(module: nn.Module) -> bool:
    """Whether a copy of the module behaves as the module does, apart from its mode."""
    if has_hooks(module):
        return False
    kind = type(module)
    home = kind.__module__
    ours = home in ("iql_torchrl.networks", "iql_torchrl.policies")
    return ours or kind in (*WRAPPERS, TorchRLMLP) or home.startswith("torch.nn.modules.")


def is_single(network: Any) -> bool:
    """Whether it is one plain module, positional keys in and one key out."""
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


def _leaves_no_trace(network: nn.Module) -> bool:
    """Whether evaluating targets with it as well leaves nothing behind."""
    return not any(isinstance(m, NORMALISING) for m in network.modules())


def is_head_and_distribution(actor: Any) -> bool:
    parts = list(actor) if isinstance(actor, TensorDictSequential) else []
    return (
        len(parts) == 2
        and _is_plain(parts[0])
        and type(parts[1]) in (ProbabilisticTensorDictModule, SafeProbabilisticModule)
        and not actor.return_composite
    )


def _unstack_around(clone: Any) -> bool:
    """Prepare a network with stacked parameters: its last part may use them, nothing else.

    False when something before the final perceptron has parameters, or buffers that differ
    between the critics.
    """
    module: nn.Module = clone.module
    body: Any = module.mlp if type(module) in OURS[:2] else module
    if not isinstance(body, nn.Module) or linear_layers(body) is None:
        return False
    inside = set(body.modules())
    for part in module.modules():
        if part in inside:
            continue
        if any(True for _ in part.parameters(recurse=False)):
            return False
        for name, buffer in part.named_buffers(recurse=False):
            if type(part) is not networks.Standardise or not bool((buffer == buffer[:1]).all()):
                return False
            setattr(part, name, buffer[0])
    return True


def _condense(module: nn.Module, made: dict[nn.Module, Dense] | None = None) -> None:
    """Replace perceptrons within ``module`` by Dense, in place; one used twice stays one."""
    made = {} if made is None else made
    for name, child in list(children_of(module).items()):
        if isinstance(child, nn.Sequential) and linear_layers(child) is not None:
            made[child] = made.get(child) or Dense(child)
            setattr(module, name, made[child])
        elif child is not None:
            _condense(child, made)
    pick_first(module, Dense)


def pick_first(module: nn.Module, kind: type[Any]) -> None:
    """Let a perceptron of ``kind`` behind a OneHot take the categories themselves."""
    parts = children_of(module)
    first, body = parts.get("preprocess"), parts.get("mlp")
    if type(module) is networks.Critic:  # which joins them with the action
        return
    if type(first) is networks.OneHot and isinstance(body, kind):
        parts["preprocess"], body.picks = Category(), True
