"""Evaluation of a loss's networks in an update: without TensorDict, without vmap, without copies.

TorchRL's losses put parameters into a network at every evaluation, and map over critics. Here the
user's own modules run, with two parts of them replaced where they are recognised by their structure:
the perceptron is evaluated over the parameters that are asked for, live or target, of one network or
of many, and a category selects a column of the first layer. Values are those of the general way but
for rounding; gradients cannot be differentiated again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any, TypeGuard

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import SafeModule, SafeProbabilisticModule, ValueOperator

from iql_torchrl.config import launches_kernels
from iql_torchrl.networks.perceptrons import MLP, AroundPerceptron, OneHot, Standardise
from iql_torchrl.networks.products import affine, matmul, product
from iql_torchrl.private_apis import children_of, has_hooks, hook_tables, reads_positions

aten = torch.ops.aten
# In place on the layer's output, and the gradient from that output alone.
DERIVATIVES: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda gradient, out: aten.threshold_backward(gradient, out, 0)),
    nn.Tanh: (torch.tanh_, aten.tanh_backward),
}
# Modules that act on every number for itself.
ELEMENTWISE = (
    nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Identity, nn.Dropout,
)  # fmt: skip
# First layers that treat every row for itself and draw no random numbers.
BY_ROW = (OneHot, Standardise, nn.Identity)
FEW, SMALL = 32, 2**22


# -- what is recognised ------------------------------------------------------------------------------


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


# -- perceptrons -------------------------------------------------------------------------------------


class Perceptron:
    """What the Sequential ``source`` computes, over parameters ``leaves`` that may be stacked.

    ``leaves`` are the parameters in the order of the layers: weights ``(*K, out, in)``, biases
    ``(*K, out)``. Inputs are joined on the last dimension:

    - ``(*B, in)`` gives ``(*K, *B, out)``: every network reads the same batch;
    - with ``per_run``, ``(B, in)`` or ``(P, B, in)`` gives ``(P, ..., B, out)``: each of P runs, the
      first dimension of ``leaves``, may have a batch of its own;
    - with ``picks``, categories without the last dimension are read in place of one-hot vectors;
    - with ``detached``, no gradient reaches ``leaves``.

    Outside of ``torch.compile`` and autocast, layers that :func:`linear_layers` lists have a
    written-out gradient, which cannot be differentiated again.
    """

    def __init__(
        self,
        source: nn.Sequential,
        leaves: Sequence[Tensor],
        *,
        per_run: bool = False,
        picks: bool = False,
        detached: bool = False,
    ) -> None:
        self.layers = tuple(source)
        self.counts = tuple(len(list(layer.parameters(recurse=False))) for layer in self.layers)
        self.leaves = tuple(leaves)
        self.per_run, self.picks, self.detached = per_run, picks, detached
        kind = type(self.layers[1]) if len(self.layers) > 1 else nn.ReLU
        self.derivative = None if linear_layers(source) is None else DERIVATIVES[kind]

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        if not (self.picks or x.is_floating_point()):
            raise TypeError(
                f"a network's first layer got {x.dtype}; it needs floating-point observations. Give "
                "a network of categories preprocess=networks.OneHot(...), and cast other whole "
                "numbers."
            )
        batch = x.shape[:-1] if x.is_floating_point() else x.shape
        if self.per_run or len(batch) == 1:
            return self._evaluate(x)
        out = self._evaluate(x.reshape(-1, *x.shape[len(batch) :]))
        return out.view(*out.shape[:-2], *batch, out.shape[-1])

    def _evaluate(self, x: Tensor) -> Tensor:
        leaves = [leaf.detach() for leaf in self.leaves] if self.detached else self.leaves
        traced = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        if self.derivative is None or traced or leaves[0].ndim > 3:
            return self.operations(x, leaves)
        return chain(x, leaves, self.derivative)

    def operations(self, x: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The layers as operations for autograd and Inductor: ``(B, in)`` -> ``(*K, B, out)``.

        On columns, ``(*K, n, B)``, so that gradients of stacked weights come out in the layout of
        the weights.
        """
        x = x.mT if x.is_floating_point() else x
        rest = iter(leaves)
        for layer, count in zip(self.layers, self.counts, strict=True):
            x = _layer(layer, x, [next(rest) for _ in range(count)])
        return x.mT


def _layer(layer: nn.Module, x: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    if isinstance(layer, nn.Linear):
        return _linear(x, *leaves)
    if not isinstance(layer, nn.LayerNorm):
        out: Tensor = layer(x)
        return out
    x = nn.functional.layer_norm(x.mT, layer.normalized_shape, eps=layer.eps).mT
    if leaves:
        x = _widened(x, leaves[0].ndim + 1) * leaves[0].unsqueeze(-1)
    return x + leaves[1].unsqueeze(-1) if len(leaves) > 1 else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not x.is_floating_point():
        x = _picked(weight, x)
    elif torch.compiler.is_compiling() and _is_better_summed(weight, x):
        x = _widened(x, weight.ndim)
        if weight.shape[-2] == 1:
            x = (weight.mT * x).sum(-2, keepdim=True)
        else:
            x = (weight.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2)
    elif x.ndim == 2 < weight.ndim:  # one input for all: one product
        x = matmul(weight.flatten(0, -2), x).unflatten(0, weight.shape[:-1])
    else:
        x = matmul(weight, _widened(x, weight.ndim))
    return x if bias is None else x + bias.unsqueeze(-1)


def _is_better_summed(weight: Tensor, x: Tensor) -> bool:
    """Whether a program computes ``weight @ x`` as a sum of products, fused with what surrounds it.

    So with one output and many inputs; and on a GPU, where a launch takes longer than a small product,
    with at most ``FEW`` inputs or outputs and at most ``SMALL`` multiplications. The same holds for the
    gradients.
    """
    outputs, inputs = weight.shape[-2:]
    if outputs == 1 and not x.ndim == 2 < weight.ndim:
        return True
    if not launches_kernels(x.device) or min(inputs, outputs) > FEW:
        return False
    return weight.numel() * x.shape[-1] <= SMALL


def _widened(x: Tensor, ndim: int) -> Tensor:
    """``(P, n, B)`` with a dimension for the K critics of a run; ``(n, B)``, for all, as it is."""
    return x.unsqueeze(1) if 2 < x.ndim < ndim else x


def _picked(weight: Tensor, index: Tensor) -> Tensor:
    """``weight @ one_hot(index).mT`` without the product: ``(*K, out, in)`` -> ``(*K, out, B)``.

    ``index`` is ``(B,)``, or ``(P, B)`` for weights ``(P, ..., out, in)``. Raises on indices
    outside ``[0, in)``.
    """
    shape = index.shape[:-1] + (1,) * (weight.ndim - index.ndim) + index.shape[-1:]
    return weight.gather(-1, index.view(shape).expand(*weight.shape[:-1], -1))


def chain(
    x: Tensor,
    leaves: Sequence[Tensor],
    activation: tuple[Callable[..., Tensor], Callable[..., Tensor]] = DERIVATIVES[nn.ReLU],
) -> Tensor:
    """Linear layers with one activation between them, over ``(out, in)`` or ``(P, out, in)`` weights.

    ``leaves``: weight and bias of each layer in turn. ``x`` is ``(B, in)``, or ``(P, B, in)``, or
    categories without the last dimension. The gradient is written out (one call for all layers) and
    cannot be differentiated again.
    """
    out: Tensor = _Chain.apply(x, *activation, *leaves)
    return out


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Callable[..., Tensor],
        derivative: Callable[..., Tensor],
        *leaves: Tensor,
    ) -> Tensor:
        inputs = [x]
        for weight, bias in zip(leaves[::2], leaves[1::2], strict=True):
            if not x.is_floating_point():
                x = _picked(weight, x).mT + bias.unsqueeze(-2)
            else:
                x = affine(x, weight, bias)
            if len(inputs) < len(leaves) // 2:
                inputs.append(activation(x))
        ctx.derivative = derivative
        ctx.save_for_backward(*inputs, *leaves[::2])
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        layers = len(saved) // 2
        inputs, weights = saved[:layers], saved[layers:]
        of_leaves: list[Tensor | None] = [None] * (2 * layers)
        needed = ctx.needs_input_grad
        for i in reversed(range(layers)):
            if needed[3 + 2 * i]:
                of_leaves[2 * i] = _weight_gradient(gradient, inputs[i], weights[i])
            if needed[4 + 2 * i]:
                of_leaves[2 * i + 1] = gradient.sum(-2)
            if i > 0:
                gradient = ctx.derivative(product(gradient, weights[i]), inputs[i])
        of_input = None
        if needed[0]:
            of_input = product(gradient, weights[0])
            of_input = of_input if of_input.ndim == inputs[0].ndim else of_input.sum(0)
        return of_input, None, None, *of_leaves


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if x.is_floating_point():
        return product(gradient.mT, x)
    return torch.zeros_like(weight).scatter_add_(
        -1, x.unsqueeze(-2).expand_as(gradient.mT), gradient.mT
    )


# -- networks ----------------------------------------------------------------------------------------


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
        first: nn.Module | None = None,
    ) -> None:
        self.in_keys, self.body = list(in_keys), body
        self.module: Any = module
        around = isinstance(module, AroundPerceptron)
        self.first: Any = (first or self.module.preprocess) if around else None
        plain = body is not None and body.derivative is not None and not body.per_run
        self.by_row = plain and (not around or type(self.first) in BY_ROW)
        if (
            body is not None
            and type(self.first) is OneHot
            and not has_hooks(self.first)
            and getattr(module, "mlp_reads_first", False)
            and type(body.layers[0]) is nn.Linear
        ):
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


def network_over(
    module: nn.Module, in_keys: Sequence[NestedKey], params: TensorDictBase, *, per_run: bool
) -> Direct:
    """``module``, whose perceptron, where it has one, is evaluated over its parameters ``params``.

    Other parameters are those in the module. With ``per_run``, ``params`` are ``(P, ...)``.
    """
    body = perceptron_of(module, stacked=per_run)
    if body is None:
        return Direct(module, in_keys)
    return Direct(module, in_keys, Perceptron(body, _leaves(module, params), per_run=per_run))


def critics_over(
    network: Any, params: TensorDictBase, *, per_run: bool, detached: bool
) -> Direct | None:
    """A critic over parameters of one, or stacked for K; with ``detached`` they get no gradient.

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
    leaves = _leaves(module, params.get("module"))
    over = Perceptron(body, leaves, per_run=per_run, detached=detached)
    return Direct(module, network.in_keys, over, first)


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
