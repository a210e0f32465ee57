"""Which networks an update can evaluate directly, recognised by their structure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Number
from typing import Any, TypeGuard

from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import SafeModule, SafeProbabilisticModule, ValueOperator

from iql_torchrl.networks.encoders import OneHot
from iql_torchrl.networks.evaluation import DERIVATIVES, Direct, Perceptron
from iql_torchrl.networks.perceptrons import MLP, AroundPerceptron, Standardise
from iql_torchrl.private_apis import children_of, has_hooks, reads_positions

# Modules that act on every number for itself.
ELEMENTWISE = (
    nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Identity, nn.Dropout,
)  # fmt: skip
# First layers that treat every row for itself and draw no random numbers.
BY_ROW = (OneHot, Standardise, nn.Identity)


def _is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it runs its parts one after the other and nothing else; TorchRL's MLP may reshape."""
    if type(module) is TorchRLMLP:
        return isinstance(module.out_features, Number)
    return type(module) in (nn.Sequential, MLP)


def is_stackable(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether :class:`Perceptron` computes what the module does over stacked parameters.

    True for Sequentials of Linear, LayerNorm over the last dimension and element-wise modules, with
    at least one Linear.
    """
    parts = list(module) if _is_sequential(module) else []
    return any(type(part) is nn.Linear for part in parts) and all(
        type(part) in (nn.Linear, *ELEMENTWISE)
        or (type(part) is nn.LayerNorm and len(part.normalized_shape) == 1)
        for part in parts
    )


def linear_layers(module: nn.Module) -> list[nn.Linear] | None:
    """The Linear layers of a Sequential that alternates them with one ReLU or Tanh, else None."""
    if not _is_sequential(module):
        return None
    parts: list[Any] = list(module)  # children() names a module once, however often it runs
    layers, between = parts[::2], parts[1::2]
    kinds = {type(layer) for layer in between}
    alternates = len(layers) == len(between) + 1 and len(kinds) <= 1 and kinds <= set(DERIVATIVES)
    if not alternates or any(type(x) is not nn.Linear or x.bias is None for x in layers):
        return None
    return layers


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
    """The perceptron of ``module``, itself or its ``mlp``, if :func:`linear_layers` knows it.

    With ``stacked`` :func:`is_stackable` suffices. None where something hooks on to it, or a derived
    class changed what calls it.
    """
    body: Any = module
    if isinstance(module, AroundPerceptron):
        if type(module).forward is not AroundPerceptron.forward or has_hooks(module):
            return None
        body = module.mlp
    known = is_stackable(body) if stacked else linear_layers(body) is not None
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
    around = isinstance(module, AroundPerceptron)
    first_layer: Any = (first or module.preprocess) if around else None
    body = perceptron_of(module, stacked=per_run)
    if body is None:
        return Direct(module, in_keys)
    known = linear_layers(body) is not None
    picks = (
        type(first_layer) is OneHot
        and not has_hooks(first_layer)
        and getattr(module, "mlp_reads_first", False)
        and type(body[0]) is nn.Linear
    )
    over = Perceptron(
        body,
        _leaves(module, params),
        derivative=DERIVATIVES[type(body[1]) if len(body) > 1 else nn.ReLU] if known else None,
        per_run=per_run,
        picks=picks,
        detached=detached,
    )
    by_row = known and not per_run and (first_layer is None or type(first_layer) in BY_ROW)
    first_layer = Tensor.long if picks else first_layer
    return Direct(module, in_keys, over, first_layer, by_row=by_row, critics=critics)


def critics_over(
    network: Any, params: TensorDictBase, count: int, *, per_run: bool, detached: bool
) -> Direct | None:
    """``count`` critics over their parameters, of one or stacked; ``detached``: without gradient.

    None where more than the perceptron has parameters, or statistics before it differ between the
    critics.
    """
    module = network.module
    body = perceptron_of(module, stacked=per_run)
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
    options: Any = {"per_run": per_run, "detached": detached, "first": first, "critics": count}
    return network_over(module, network.in_keys, params.get("module"), **options)


def _leaves(module: nn.Module, params: TensorDictBase) -> list[Tensor]:
    """Entries of ``params`` for the perceptron of ``module``, in the order of its layers."""
    around = isinstance(module, AroundPerceptron)
    body: Any = module.mlp if around else module
    of_body = params.get("mlp") if around else params
    return [
        of_body.get((place, name))
        for place, layer in children_of(body).items()
        for name, _ in layer.named_parameters(recurse=False)
    ]


def _first_of_all(preprocess: nn.Module, params: TensorDictBase) -> nn.Module | None:
    """A first layer with the statistics that all critics have; None where they differ."""
    shared = copy.deepcopy(preprocess)
    for path, part in shared.named_modules():
        for name, _ in list(part.named_buffers(recurse=False)):
            values = params.get((*filter(None, path.split(".")), name))
            values = values.flatten(0, params.batch_dims - 1)
            if not isinstance(part, Standardise) or not bool((values == values[:1]).all()):
                return None
            setattr(part, name, values[0])
    return shared
