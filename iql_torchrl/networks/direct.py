"""Evaluation of a loss's networks in an update: without TensorDict, without vmap, without copies.

TorchRL's losses put parameters into a network at every evaluation, and map over critics. Here the
user's own modules run, with two parts of them replaced where they are recognised by their structure:
the perceptron is evaluated over the parameters that are asked for, live or target, of one network or
of many, and a category selects a column of the first layer. Values are those of the general way but
for rounding; gradients cannot be differentiated again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import SafeModule, SafeProbabilisticModule, ValueOperator

from iql_torchrl.networks import AroundPerceptron, OneHot, Standardise
from iql_torchrl.networks.evaluation import Perceptron, linear_layers
from iql_torchrl.private_apis import children_of, has_hooks, hook_tables, reads_positions

__all__ = [
    "Direct",
    "DirectNetworks",
    "critics_over",
    "distribution_of",
    "is_head_and_distribution",
    "leaves_of",
    "network_over",
    "writes",
]

SINGLE = (TensorDictModule, SafeModule, ValueOperator)
BY_ROW = (OneHot, Standardise, nn.Identity)
"""First layers that treat every row for itself and draw no random numbers."""


def is_plain(network: Any) -> bool:
    """Whether it calls one module with the entries of its keys, in their order, and nothing else."""
    return (
        type(network) in SINGLE
        and isinstance(network.module, nn.Module)
        and reads_positions(network)
        and not (network.method or network.method_kwargs)
        and not has_hooks(network)
    )


def writes(network: Any, key: NestedKey) -> bool:
    """Whether it is plain and its one output goes where the loss reads it."""
    keys = list(map(unravel_key, network.out_keys)) if is_plain(network) else []
    return keys == [unravel_key(key)]


def is_head_and_distribution(actor: Any) -> bool:
    """Whether it is one plain module followed by one distribution, a usual ProbabilisticActor."""
    parts = list(actor) if isinstance(actor, TensorDictSequential) else []
    return (
        len(parts) == 2
        and is_plain(parts[0])
        and type(parts[1]) in (ProbabilisticTensorDictModule, SafeProbabilisticModule)
        and not actor.return_composite
        and not any(map(has_hooks, (actor, parts[1])))
    )


def perceptron_of(module: nn.Module) -> nn.Sequential | None:
    """The perceptron of ``module``, itself or its ``mlp``, if :func:`linear_layers` knows it.

    None where something hooks on to it, or a derived class changed what calls it.
    """
    body: Any = module
    if isinstance(module, AroundPerceptron):
        if type(module).forward is not AroundPerceptron.forward or has_hooks(module):
            return None
        body = module.mlp
    known = isinstance(body, nn.Module) and linear_layers(body) is not None
    return body if known and not any(map(has_hooks, (body, *body))) else None


class Direct:
    """``module`` called with the entries ``in_keys`` of a TensorDict, without TensorDict.

    With ``body``, it takes the place of the module's perceptron; a category that would become a
    one-hot vector for it then stays a number. ``first``: takes the place of the first layer.
    """

    def __init__(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey] = (),
        body: Perceptron | None = None,
        first: Callable[..., Tensor] | None = None,
    ) -> None:
        self.in_keys, self.body, self.module = list(in_keys), body, module
        around = isinstance(module, AroundPerceptron)
        self.first: Any = (first or module.preprocess) if around else None
        plain = body is not None and body.activation is not None and not body.per_run
        self.by_row = plain and (not around or type(self.first) in BY_ROW)
        if body is not None and around and picks_columns(module, body):
            self.first, body.picks = Tensor.long, True

    def __call__(self, data: TensorDictBase) -> Any:
        return self.run(*[data.get(key) for key in self.in_keys])

    def run(self, *inputs: Tensor) -> Any:
        if self.body is None:
            return self.module(*inputs)
        if self.first is None:
            return self.body(*inputs)
        return self.module.around(self.first, self.body, *inputs)

    def twice(self, first: TensorDictBase, second: TensorDictBase) -> Sequence[Tensor]:
        """Outputs of two batches of one shape from a single evaluation; only where ``by_row``."""
        inputs = [torch.stack([first.get(key), second.get(key)]) for key in self.in_keys]
        value: Tensor = self.run(*inputs)
        return value.unbind()


def picks_columns(module: Any, body: Perceptron) -> bool:
    """Whether the perceptron reads the one-hot vector of a category and nothing else."""
    return (
        module.mlp_reads_first
        and type(module.preprocess) is OneHot
        and not has_hooks(module.preprocess)
        and type(body.layers[0]) is nn.Linear
    )


def leaves_of(body: nn.Sequential, params: TensorDictBase) -> list[Tensor]:
    """Entries of ``params`` for a perceptron, in the order of its layers."""
    return [
        params.get((place, name))
        for place, layer in children_of(body).items()
        for name, _ in layer.named_parameters(recurse=False)
    ]


def network_over(module: nn.Module, in_keys: Sequence[NestedKey], params: TensorDictBase) -> Direct:
    """``module``, whose perceptron, where it has one, is evaluated over its parameters ``params``."""
    body = perceptron_of(module)
    if body is None:
        return Direct(module, in_keys)
    of_body = params if body is module else params.get("mlp")
    return Direct(module, in_keys, Perceptron(body, leaves_of(body, of_body)))


def critics_over(network: Any, params: TensorDictBase, *, detached: bool) -> Direct | None:
    """A critic over parameters of one, or stacked for K; with ``detached`` they get no gradient.

    None where more than the perceptron has parameters, or statistics before it differ between the
    critics.
    """
    module = network.module
    body = perceptron_of(module)
    if body is None:
        return None
    first = None
    if body is not module:
        if any(True for _ in module.preprocess.parameters()):
            return None
        if params.batch_dims and any(True for _ in module.preprocess.buffers()):
            first = _first_of_all(module.preprocess, params.get(("module", "preprocess")))
            if first is None:
                return None
    leaves = leaves_of(body, params.get("module" if body is module else ("module", "mlp")))
    return Direct(module, network.in_keys, Perceptron(body, leaves, detached=detached), first)


def _first_of_all(preprocess: nn.Module, params: TensorDictBase) -> nn.Module | None:
    """A first layer with the statistics that all critics have; None where they differ."""
    shared = copy.deepcopy(preprocess)
    for path, part in shared.named_modules():
        for name, _ in list(part.named_buffers(recurse=False)):
            values = params.get((*filter(None, path.split(".")), name))
            if not isinstance(part, Standardise) or not bool((values == values[:1]).all()):
                return None
            setattr(part, name, values[0])
    return shared


class Watched:
    """Numbers, parts and hooks of networks, to notice that one of them is another now."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
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


class DirectNetworks:
    """What evaluates the networks of a loss in an update; None, or a name left out: the general way.

    ``value``: V. ``critics``: by the name of their parameters. ``head``: the policy's network before
    its distribution, or the velocity of a flow.
    """

    def __init__(
        self,
        watched: Sequence[nn.Module],
        value: Direct | None,
        critics: Mapping[str, Direct],
        head: Direct | None,
    ) -> None:
        self.value, self.critics, self.head = value, dict(critics), head
        self.watched = Watched(watched)


def distribution_of(actor: Any, head: Direct, data: TensorDictBase) -> Any:
    """The distribution of an actor that is a head and a distribution, without TensorDict."""
    out = head(data)
    values = (out,) if isinstance(out, Tensor) else out
    parameters = dict(zip(actor[0].out_keys, values, strict=True))
    for key in actor[1].in_keys:
        if key not in parameters:  # an action mask, which runs of a population may share
            mask, like = data.get(key), values[0]
            parameters[key] = mask.expand(*like.shape[: like.ndim - mask.ndim], *mask.shape)
    return actor[1].get_dist(parameters)  # it only calls ``get``
