"""Evaluation of a loss's networks without TensorDict and vmap, where their structure allows it.

TorchRL's losses put parameters into a network at every evaluation, and map over critics. Copies of
known networks that hold the loss's own parameters need neither; in these copies perceptrons are
:class:`~iql_torchrl.fast_networks.perceptron.Perceptron`. All other networks are evaluated as
TorchRL evaluates them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from iql_torchrl import networks
from iql_torchrl.fast_networks.detect import (
    BODIES,
    is_head_and_distribution,
    is_known,
    keeps_buffers,
    pick_first,
    writes,
)
from iql_torchrl.fast_networks.perceptron import Category, Perceptron, linear_layers
from iql_torchrl.host import (
    DETACHED_CRITICS,
    LIVE_CRITICS,
    LIVE_ENCODER,
    TARGET_CRITICS,
    TARGET_ENCODER,
    children_of,
    hook_tables,
    parameters_of,
)

__all__ = [
    "DirectActor",
    "FastEvaluator",
    "Watched",
    "detach_all",
    "entry_key",
    "follow_modes",
    "hold_parameters",
]

Modes = list[tuple[nn.Module, nn.Module]]
# Modules that treat every row for itself and draw no random numbers.
BY_ROW = (
    networks.OneHot,
    networks.Standardise,
    networks.StateValue,
    Category,
    Perceptron,
    nn.Identity,
)


class Watched:
    """Numbers, parts and hooks of networks, to notice that one of them is another now."""

    def __init__(self, *networks: nn.Module) -> None:
        modules = list(dict.fromkeys(m for network in networks for m in network.modules()))
        self._values = [
            (vars(m), name, value)
            for m in modules
            for name, value in vars(m).items()
            if isinstance(value, (bool, int, float, str)) and name != "training"
        ]
        self._parts = [(children_of(m), dict(children_of(m))) for m in modules]
        self._hooks = [(table, len(table)) for m in modules for table in hook_tables(m)]

    def changed(self) -> bool:
        """Takes some microseconds for each network."""
        return (
            any(table.get(name) is not value for table, name, value in self._values)
            or any(table != before for table, before in self._parts)
            or any(len(table) != count for table, count in self._hooks)
        )


class FastEvaluator:
    """An evaluator (``objectives.evaluator.Evaluator``) that is fast on known networks.

    ``value``, ``actor`` and ``critics`` hold the copies; those are None, and ``critics`` lacks a
    name, where ``general`` evaluates the network. Values are the same but for rounding; gradients
    cannot be differentiated again. :meth:`is_outdated` says that a network was changed.
    """

    def __init__(self, loss: Any, general: Any) -> None:
        self.general = general
        self.modes: Modes = []
        names = ("actor_network", "qvalue_network", "value_network", "encoder_network")
        networks = [getattr(loss, name) for name in names]
        self._watched = Watched(*(network for network in networks if network is not None))
        trunks = {entry.network for entry in loss.shared.trunk}
        self.value: _Direct | None = None
        self.critics: dict[str, _Direct] = {}
        if "value_network" not in trunks:
            clone = self._bind(loss.value_network, loss.value_network_params)
            if clone is not None and writes(clone, loss.tensor_keys.value):
                self.value = _Direct(clone)
        self.actor: Any = self._bind(loss.actor_network, loss.actor_network_params)
        if self.actor is not None and is_head_and_distribution(self.actor):
            self.actor = DirectActor(self.actor)
        self.encoders: dict[bool, Any] = {}
        if loss.encoder_network is not None:
            for target in (False, True):
                name = TARGET_ENCODER if target else LIVE_ENCODER
                params = children_of(loss).get(name, TensorDict())  # TorchRL keeps no empty one
                clone = self._bind(loss.encoder_network, params)
                if clone is not None:
                    self.encoders[target] = clone
        critic = loss.qvalue_network
        named = writes(critic, loss.tensor_keys.state_action_value)
        if "qvalue_network" not in trunks and named and keeps_buffers(critic):
            alone = loss.num_qvalue_nets == 1
            for name in (LIVE_CRITICS, TARGET_CRITICS, DETACHED_CRITICS):
                params = children_of(loss)[
                    TARGET_CRITICS if name == TARGET_CRITICS else LIVE_CRITICS
                ]
                clone = self._bind(critic, params, stacked=not alone)
                if clone is not None and (name != DETACHED_CRITICS or detach_all(clone)):
                    self.critics[name] = _Alone(clone) if alone else _Direct(clone)

    def is_outdated(self) -> bool:
        """Whether an attribute, a part or the hooks of a network have changed since the copies."""
        return self._watched.changed()

    def follow_modes(self) -> None:
        """Set training or evaluation mode as the loss's own networks have it."""
        follow_modes(self.modes)

    def state_value(self, loss: Any, data: TensorDictBase) -> Tensor:
        if self.value is None:
            value: Tensor = self.general.state_value(loss, data)
            return value
        return self.value(data)

    def state_values(
        self, loss: Any, first: TensorDictBase, second: TensorDictBase
    ) -> Sequence[Tensor] | None:
        if self.value is None or not self.value.by_row:
            return None
        return self.value.twice(first, second)

    def critic_outputs(self, loss: Any, data: TensorDictBase, name: str) -> Tensor:
        if name in self.critics:
            return self.critics[name](data)
        outputs: Tensor = self.general.critic_outputs(loss, data, name)
        return outputs

    def features(self, loss: Any, data: TensorDictBase, target: bool) -> TensorDictBase:
        encoder = self.encoders.get(target)
        if encoder is None:
            features: TensorDictBase = self.general.features(loss, data, target)
            return features
        written: TensorDictBase = encoder(data).select(*encoder.out_keys)
        return written

    @contextmanager
    def policy(self, loss: Any) -> Iterator[Any]:
        """The copy; the loss's own network where a function of the user's may do anything with it."""
        if self.actor is None or callable(loss.actor_objective):
            with self.general.policy(loss) as actor:
                yield actor
        else:
            yield self.actor

    def _bind(self, network: nn.Module, params: Any, stacked: bool = False) -> nn.Module | None:
        if not all(is_known(module) for module in network.modules()):
            return None
        clone = copy.deepcopy(network)
        params.to_module(clone)
        hold_parameters(clone, params)
        if stacked and not _unstack_around(clone):
            return None
        originals = dict(network.named_modules())
        _condense(clone)
        self.modes += [(originals[name], m) for name, m in clone.named_modules()]
        return clone


def follow_modes(modes: Modes) -> None:
    """Give the second module of each pair the mode of the first."""
    for original, clone in modes:
        if clone.training is not original.training:
            clone.training = original.training


def detach_all(network: nn.Module) -> bool:
    """Let no gradient reach the parameters; False where some are outside of perceptrons."""
    for module in network.modules():
        if isinstance(module, Perceptron):
            module.detached = True
    return not any(True for _ in network.parameters())


class _Direct:
    """``network`` called with the entries of its keys, without TensorDict."""

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


class _Alone(_Direct):
    """The same for one critic, ``(*B, n)`` -> ``(1, *B, n)``."""

    def __call__(self, data: TensorDictBase) -> Tensor:
        return super().__call__(data).unsqueeze(0)


class DirectActor:
    """An actor of one plain module and one distribution, which is built without TensorDict."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._head, self._last = actor[0], actor[1]

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        out: TensorDictBase = self._actor(data)
        return out

    def head(self, data: TensorDictBase) -> Any:
        """Output of the module before the distribution."""
        return self._head.module(*[data.get(key) for key in self._head.in_keys])

    def get_dist(self, data: TensorDictBase) -> Any:
        out = self.head(data)
        values = (out,) if isinstance(out, Tensor) else out
        parameters = dict(zip(self._head.out_keys, values, strict=True))
        for key in self._last.in_keys:
            if key not in parameters:  # an action mask, which runs of a population may share
                mask, like = data.get(key), values[0]
                parameters[key] = mask.expand(*like.shape[: like.ndim - mask.ndim], *mask.shape)
        return self._last.get_dist(parameters)  # it only calls ``get``

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


def hold_parameters(clone: nn.Module, params: TensorDictBase) -> None:
    """Replace the network's parameters by the tensor objects in ``params``, of any tensor class.

    ``to_module`` makes parameters of target tensors: other objects on the same memory. A compiled
    update that reads the one and writes the other copies both at every call.
    """
    for path, module in clone.named_modules():
        table = parameters_of(module)
        for name in [name for name, tensor in table.items() if tensor is not None]:
            table[name] = params.get(entry_key(path, name))


def entry_key(path: str, name: str) -> NestedKey:
    """Key in a loss's parameters of the tensor ``name`` of the module at ``path``."""
    return tuple(f"{path}.{name}".removeprefix(".").split("."))


def _unstack_around(clone: Any) -> bool:
    """Prepare a network with stacked parameters: its last part may use them, nothing else.

    False when something before the final perceptron has parameters, or buffers that differ
    between the critics.
    """
    module: nn.Module = clone.module
    body: Any = module.mlp if type(module) in BODIES else module
    if not isinstance(body, nn.Module) or linear_layers(body) is None:
        return False
    inside = set(body.modules())
    for part in module.modules():
        if part in inside:
            continue
        if any(True for _ in part.parameters(recurse=False)):
            return False
        for name, buffer in list(part.named_buffers(recurse=False)):
            if type(part) is not networks.Standardise or not bool((buffer == buffer[:1]).all()):
                return False
            setattr(part, name, buffer[0])
    return True


def _condense(module: nn.Module, made: dict[nn.Module, Perceptron] | None = None) -> None:
    """Replace perceptrons within ``module``, in place; one that is used twice stays one."""
    made = {} if made is None else made
    for name, child in list(children_of(module).items()):
        if isinstance(child, nn.Sequential) and linear_layers(child) is not None:
            made[child] = made.get(child) or Perceptron(child)
            setattr(module, name, made[child])
        elif child is not None:
            _condense(child, made)
    pick_first(module)
