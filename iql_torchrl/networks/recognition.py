"""Which networks an update can evaluate directly, recognised by their structure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from numbers import Number
from typing import Any, cast

from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import SafeModule, SafeProbabilisticModule, ValueOperator

from iql_torchrl.networks.encoders import OneHot
from iql_torchrl.networks.evaluation import DERIVATIVES, Activation, Direct, Perceptron
from iql_torchrl.networks.perceptrons import MLP, AroundPerceptron, Standardise
from iql_torchrl.private_apis import children_of, has_hooks, reads_positions

# Modules that act on every number for itself.
ELEMENTWISE = (
    nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Identity, nn.Dropout,
)  # fmt: skip
# First layers that treat every row for itself and draw no random numbers.
BY_ROW = (OneHot, Standardise, nn.Identity, type(None))


def _parts(module: nn.Module) -> list[Any]:
    """What a module runs one after the other, where it does nothing else; TorchRL's MLP may reshape."""
    runs = type(module) in (nn.Sequential, MLP)
    if type(module) is TorchRLMLP:
        runs = isinstance(module.out_features, Number)
    return list(cast(nn.Sequential, module)) if runs else []  # children() names a module once


def is_stackable(module: nn.Module) -> bool:
    """Whether :class:`Perceptron` computes what the module does over stacked parameters.

    True for Sequentials of Linear, LayerNorm over the last dimension and element-wise modules, with
    at least one Linear.
    """
    parts = _parts(module)
    return any(type(part) is nn.Linear for part in parts) and all(
        type(part) in (nn.Linear, *ELEMENTWISE)
        or (type(part) is nn.LayerNorm and len(part.normalized_shape) == 1)
        for part in parts
    )


def one_activation(module: nn.Module) -> Activation | None:
    """That of a Sequential that alternates Linear layers with one ReLU or Tanh, else None.

    A single Linear layer has none, and counts as one with ReLU.
    """
    parts = _parts(module)
    kinds = {type(part) for part in parts[1::2]} or {nn.ReLU}
    linear = all(type(part) is nn.Linear and part.bias is not None for part in parts[::2])
    return DERIVATIVES.get(kinds.pop()) if linear and len(parts) % 2 and len(kinds) == 1 else None


def is_plain(network: Any) -> bool:
    """Whether it calls one module with the entries of its keys, in their order, and nothing else."""
    return (
        type(network) in (TensorDictModule, SafeModule, ValueOperator)
        and isinstance(network.module, nn.Module)
        and reads_positions(network)
        and not (network.method or network.method_kwargs)
        and not has_hooks(network)
    )


def writes(network: Any, key: NestedKey) -> bool:
    """Whether it is plain and its one output goes where the loss reads it."""
    return is_plain(network) and [unravel_key(k) for k in network.out_keys] == [unravel_key(key)]


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


def perceptron_of(module: nn.Module, *, stacked: bool = False) -> nn.Sequential | None:
    """The perceptron of ``module``, itself or its ``mlp``, if :func:`one_activation` knows it.

    With ``stacked`` :func:`is_stackable` suffices. None where something hooks on to it, or a derived
    class changed what calls it.
    """
    body: Any = module
    if isinstance(module, AroundPerceptron):
        if type(module).forward is not AroundPerceptron.forward or has_hooks(module):
            return None
        body = module.mlp
    known = is_stackable(body) if stacked else one_activation(body) is not None
    return body if known and not any(map(has_hooks, (body, *body))) else None


def network_over(
    module: nn.Module,
    in_keys: Sequence[NestedKey],
    params: TensorDictBase,
    *,
    per_run: bool,
    detached: bool = False,
    first: nn.Module | None = None,
    critics: int = 0,
) -> Direct:
    """``module``, whose perceptron, where it has one, is evaluated over its parameters ``params``.

    Other parameters are those in the module. With ``per_run``, ``params`` are ``(P, ...)``; with
    ``detached`` they get no gradient. ``first``: takes the place of the first layer. ``critics``: how
    many networks the parameters are of, where these are critics.
    """
    body = perceptron_of(module, stacked=per_run)
    if body is None:
        return Direct(module, in_keys)
    around: Any = None if body is module else module
    first_layer: Any = None
    if around is not None:
        first_layer, params = first or around.preprocess, params.get("mlp")
    picks = (
        type(first_layer) is OneHot
        and not has_hooks(first_layer)
        and around.mlp_reads_first
        and type(body[0]) is nn.Linear
    )
    leaves = [
        params.get((place, name))
        for place, layer in children_of(body).items()
        for name, _ in layer.named_parameters(recurse=False)
    ]
    activation = one_activation(body)
    by_row = activation is not None and not per_run and type(first_layer) in BY_ROW
    over = Perceptron(
        body, leaves, derivative=activation, per_run=per_run, picks=picks, detached=detached
    )
    run: Any = over
    if around is not None:
        run = partial(around.around, Tensor.long if picks else first_layer, over)
    return Direct(run, in_keys, over, by_row=by_row, critics=critics)


def critics_over(
    network: Any, params: TensorDictBase, count: int, *, per_run: bool, detached: bool
) -> Direct | None:
    """``count`` critics over their parameters, of one or stacked; ``detached``: without gradient.

    None where more than the perceptron has parameters, or statistics before it differ between the
    critics.
    """
    module, of_module = network.module, params.get("module")
    if perceptron_of(module, stacked=per_run) is None:
        return None
    first = None
    if isinstance(module, AroundPerceptron):
        first = _first_of_all(module.preprocess, of_module.get("preprocess", None))
        if first is None:
            return None
    options: Any = {"per_run": per_run, "detached": detached, "first": first, "critics": count}
    return network_over(module, network.in_keys, of_module, **options)


def _first_of_all(preprocess: nn.Module, params: TensorDictBase | None) -> nn.Module | None:
    """The first layer with the statistics that all critics have; None where something differs."""
    if any(True for _ in preprocess.parameters()):
        return None
    holders = [part for part in preprocess.modules() if any(True for _ in part.buffers(False))]
    if params is None or not params.batch_dims or not holders:
        return preprocess
    rows = params.data.reshape(-1)
    if not all(isinstance(part, Standardise) for part in holders) or not (rows == rows[:1]).all():
        return None
    shared = copy.deepcopy(preprocess)
    rows[0].to_module(shared)
    return shared
