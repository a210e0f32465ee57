"""Multilayer perceptrons over parameters that may be stacked: K networks evaluated as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrl.modules import MLP as TorchRLMLP

from iql_torchrl.config import launches_kernels
from iql_torchrl.networks import MLP
from iql_torchrl.networks.products import affine, matmul, product

__all__ = ["Perceptron", "StackedPerceptron", "chain", "is_stackable", "linear_layers"]

aten = torch.ops.aten
# In place on the layer's output, and the gradient from that output alone.
ACTIVATIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda gradient, out: aten.threshold_backward(gradient, out, 0)),
    nn.Tanh: (torch.tanh_, aten.tanh_backward),
}
FEW, SMALL = 32, 2**22
# Modules that act on every number for itself.
ELEMENTWISE = (
    nn.ReLU,
    nn.Tanh,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.LeakyReLU,
    nn.Mish,
    nn.Softplus,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
)


def _is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it runs its parts one after the other and nothing else; TorchRL's MLP may reshape."""
    if type(module) is TorchRLMLP:
        return isinstance(module.out_features, Number)
    return type(module) in (nn.Sequential, MLP, StackedPerceptron)


def is_stackable(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether :class:`Perceptron` computes what the module does over stacked parameters.

    True for Sequentials of Linear, LayerNorm over the last dimension and element-wise modules, with
    at least one Linear.
    """
    if not _is_sequential(module):
        return False
    parts = list(module)
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
    alternates = len(layers) == len(between) + 1 and len(kinds) <= 1 and kinds <= set(ACTIVATIONS)
    if not alternates or any(type(x) is not nn.Linear or x.bias is None for x in layers):
        return None
    return layers


def _picked(weight: Tensor, index: Tensor) -> Tensor:
    """``weight @ one_hot(index).mT`` without the product: ``(*K, out, in)`` -> ``(*K, out, B)``.

    ``index`` is ``(B,)``, or ``(P, B)`` for weights ``(P, ..., out, in)``. Raises on indices
    outside ``[0, in)``.
    """
    shape = index.shape[:-1] + (1,) * (weight.ndim - index.ndim) + index.shape[-1:]
    return weight.gather(-1, index.view(shape).expand(*weight.shape[:-1], -1))


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
        self.activation = None if linear_layers(source) is None else ACTIVATIONS[kind]

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
        if self.activation is None or traced or leaves[0].ndim > 3:
            return self.operations(x, leaves)
        return chain(x, leaves, self.activation)

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


class StackedPerceptron(nn.Sequential):
    """A perceptron of many runs: layers of one of them, evaluated over the parameters of all."""

    over: Perceptron

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.over(*inputs)


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


def chain(
    x: Tensor,
    leaves: Sequence[Tensor],
    activation: tuple[Callable[..., Tensor], Callable[..., Tensor]] = ACTIVATIONS[nn.ReLU],
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
