"""Evaluation of networks in an update: without TensorDict, without vmap, without copies.

TorchRL's losses put parameters into a network at every evaluation, and map over critics. Here the
user's own modules run, with two parts of them replaced where ``networks.recognition`` knows them:
the perceptron is evaluated over the parameters that are asked for, live or target, of one network or
of many, and a category selects a column of the first layer. Values are those of the general way but
for rounding; gradients cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from iql_torchrl.config import arithmetic, launches_kernels
from iql_torchrl.networks import products
from iql_torchrl.private_apis import children_of, hook_tables

aten = torch.ops.aten
# An activation in place on a layer's output, and its gradient from that output alone.
Activation: TypeAlias = tuple[Callable[..., Tensor], Callable[..., Tensor]]
DERIVATIVES: dict[type[nn.Module], Activation] = {
    nn.ReLU: (torch.relu_, lambda gradient, out: aten.threshold_backward(gradient, out, 0)),
    nn.Tanh: (torch.tanh_, aten.tanh_backward),
}
FEW, SMALL = 32, 2**22


@dataclass(eq=False)
class Perceptron:
    """What the Sequential ``source`` computes, over parameters ``leaves`` that may be stacked.

    ``leaves`` are the parameters in the order of the layers: weights ``(*K, out, in)``, biases
    ``(*K, out)``. Inputs are joined on the last dimension:

    - ``(*B, in)`` gives ``(*K, *B, out)``: every network reads the same batch;
    - with ``per_run``, ``(B, in)`` or ``(P, B, in)`` gives ``(P, ..., B, out)``: each of P runs, the
      first dimension of ``leaves``, may have a batch of its own;
    - with ``picks``, categories without the last dimension are read in place of one-hot vectors;
    - with ``detached``, no gradient reaches ``leaves``.

    With ``derivative``, layers are linear with that one activation between them: outside of
    ``torch.compile`` and autocast they have a written-out gradient, which cannot be differentiated
    again.
    """

    source: InitVar[nn.Sequential]
    leaves: Sequence[Tensor]
    _: KW_ONLY
    derivative: Activation | None = None
    per_run: bool = False
    picks: bool = False
    detached: bool = False

    def __post_init__(self, source: nn.Sequential) -> None:
        self.layers, self.leaves = tuple(source), tuple(self.leaves)
        self.counts = tuple(len(list(layer.parameters(recurse=False))) for layer in self.layers)

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        if not (self.picks or x.is_floating_point()):
            raise TypeError(
                f"a network's first layer got {x.dtype}; it needs floating-point observations. Give "
                "a network of categories preprocess=networks.OneHot(...), and cast other whole "
                "numbers."
            )
        weights = self.leaves[0].dtype
        differs = x.dtype != weights and x.is_floating_point()
        if differs and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"a network's first layer got {x.dtype} and has weights of {weights}; cast the "
                f"batch's observations and actions to {weights}, or the loss to {x.dtype} before "
                "the optimizer is built."
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
        x = products.matmul(weight.flatten(0, -2), x).unflatten(0, weight.shape[:-1])
    else:
        x = products.matmul(weight, _widened(x, weight.ndim))
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
    activation: Activation = DERIVATIVES[nn.ReLU],
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


def product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` without autograd: matrices, or stacks of them that broadcast."""
    if arithmetic.chosen == "onednn" and products.uses_onednn(first, second):
        return products.by_pairs(first, second.mT, None)
    return first @ second


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.mT + bias`` without autograd: ``(B, in)`` and ``(out, in)``, or stacks of them."""
    if arithmetic.chosen == "onednn" and products.uses_onednn(x, weight.mT):
        return products.by_pairs(x, weight, bias)
    if weight.ndim == 2:
        return torch.addmm(bias, x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(-2), x.expand(len(weight), *x.shape[-2:]), weight.mT)


@dataclass(eq=False)
class Direct:
    """A network ``run`` with the entries ``in_keys`` of a TensorDict, without TensorDict.

    ``body``: its perceptron, if that is evaluated over parameters of choice. ``by_row``: every row of a
    batch is treated for itself, without random numbers. With ``critics``, a number K, a call gives
    ``(K, *B, n)``, of P runs ``(K, P, B, n)``.
    """

    run: Callable[..., Any]
    in_keys: Sequence[NestedKey]
    body: Perceptron | None = None
    _: KW_ONLY
    by_row: bool = False
    critics: int = 0

    def __call__(self, data: TensorDictBase) -> Any:
        out = self.run(*[data.get(key) for key in self.in_keys])
        if self.critics == 1:
            return out.unsqueeze(0)
        return out.transpose(0, 1) if self.critics and self.body and self.body.per_run else out

    def twice(self, first: TensorDictBase, second: TensorDictBase) -> Sequence[Tensor]:
        """Outputs of two batches of one shape from a single evaluation; only where ``by_row``."""
        inputs = [torch.stack([first.get(key), second.get(key)]) for key in self.in_keys]
        value: Tensor = self.run(*inputs)
        return value.unbind()


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


class Networks(NamedTuple):
    """What evaluates the networks of a loss, each called with the entries of a batch.

    ``critics``: by the name of their parameters. ``head``: of the policy, the network before its
    distribution, or the velocity of a flow; None where it is evaluated as any other module.
    """

    value: Callable[[TensorDictBase], Tensor]
    critics: Mapping[str, Callable[[TensorDictBase], Tensor]]
    distribution: Callable[[TensorDictBase], Any]
    head: Direct | None = None
    watched: Watched | None = None


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
