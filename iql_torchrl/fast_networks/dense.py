"""Multilayer perceptrons in one piece: K of them at a time, forward and backward written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Number
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrl.modules import MLP as TorchRLMLP

from iql_torchrl.networks import MLP

__all__ = ["Category", "Dense", "check_picks", "linear_layers", "picked"]

aten = torch.ops.aten
# In place on the layer's output, and the gradient from that output alone.
ACTIVATIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda gradient, out: aten.threshold_backward(gradient, out, 0)),
    nn.Tanh: (torch.tanh_, aten.tanh_backward),
}


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it runs its parts one after the other and nothing else; TorchRL's MLP may reshape."""
    if type(module) is TorchRLMLP:
        return isinstance(module.out_features, Number)
    return type(module) in (nn.Sequential, MLP)


def linear_layers(module: nn.Module) -> list[nn.Linear] | None:
    """The Linear layers of a Sequential that alternates them with one ReLU or Tanh, else None."""
    if not is_sequential(module):
        return None
    parts = list(module)  # children() names a module once, however often it runs
    layers, between = parts[::2], parts[1::2]
    kinds = {type(layer) for layer in between}
    alternates = len(layers) == len(between) + 1 and len(kinds) <= 1 and kinds <= set(ACTIVATIONS)
    if not alternates or any(type(x) is not nn.Linear or x.bias is None for x in layers):
        return None
    return cast("list[nn.Linear]", layers)


class Category(nn.Module):
    """Stands where :class:`~iql_torchrl.networks.OneHot` was, before a first layer that picks."""

    def forward(self, observation: Tensor) -> Tensor:
        return observation.long()


def picked(weight: Tensor, index: Tensor) -> Tensor:
    """``weight @ one_hot(index).mT`` without the product: ``(*K, out, in)`` -> ``(*K, out, B)``.

    ``index`` is ``(B,)``, or ``(P, B)`` for weights ``(P, ..., out, in)``. Raises on indices
    outside ``[0, in)``.
    """
    shape = index.shape[:-1] + (1,) * (weight.ndim - index.ndim) + index.shape[-1:]
    return weight.gather(-1, index.view(shape).expand(*weight.shape[:-1], -1))


def check_picks(x: Tensor, picks: bool) -> None:
    """Raise ``TypeError`` on whole numbers where no category was announced."""
    if not (picks or x.is_floating_point()):
        raise TypeError(
            f"a network's first layer got {x.dtype}; wanted floating-point observations. Give a "
            "network of categories preprocess=networks.OneHot(...), and cast other whole numbers."
        )


class Dense(nn.Module):
    """What the Sequential ``source`` computes, from parameters that may be stacked.

    Weights ``(*K, out, in)`` and biases ``(*K, out)`` with one leading dimension or none; input
    ``(*B, in)``, several joined on the last dimension; with ``picks``, categories ``(*B,)`` in place
    of their one-hot form; output ``(*K, *B, out)``. The gradient is written out, so it cannot be
    differentiated again.
    """

    def __init__(self, source: nn.Sequential) -> None:
        super().__init__()
        layers = linear_layers(source)
        assert layers is not None
        self.leaves = tuple(leaf for layer in layers for leaf in (layer.weight, layer.bias))
        self.picks = False
        kind = type(source[1]) if len(source) > 1 else nn.ReLU
        self.activation, self.derivative = ACTIVATIONS[kind]

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        check_picks(x, self.picks)
        batch = x.shape[:-1] if x.is_floating_point() else x.shape
        rows = x if len(batch) == 1 else x.reshape(-1, *x.shape[len(batch) :])
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            out = self._operations(rows)
        else:
            out = _Chain.apply(rows, self.activation, self.derivative, *self.leaves)
        return out if len(batch) == 1 else out.view(*out.shape[:-2], *batch, out.shape[-1])

    def _operations(self, x: Tensor) -> Tensor:
        """The same for autograd and Inductor, which fuse what is no matrix product.

        Stacked layers run on columns, ``(K, n, B)``, so that the weights' gradients come out in the
        weights' own layout; a single output is a sum, which costs no product of its own.
        """
        stacked = self.leaves[0].ndim == 3
        pairs = list(_pairs(self.leaves))
        for number, (weight, bias) in enumerate(pairs):
            if not x.is_floating_point():
                columns = picked(weight, x) + bias.unsqueeze(-1)
                x = columns if stacked else columns.mT
            elif stacked and number == 0:
                x = (weight.flatten(0, 1) @ x.mT).unflatten(0, bias.shape) + bias.unsqueeze(-1)
            elif stacked and bias.shape[-1] == 1:
                x = (weight.mT * x).sum(-2, keepdim=True) + bias.unsqueeze(-1)
            elif stacked:
                x = weight @ x + bias.unsqueeze(-1)
            elif len(bias) == 1:
                x = (weight * x).sum(-1, keepdim=True) + bias
            else:
                x = torch.addmm(bias, x, weight.mT)
            if number < len(pairs) - 1:
                x = x.relu() if self.activation is torch.relu_ else x.tanh()
        return x.mT if stacked else x


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Callable[..., Tensor],
        derivative: Callable[..., Tensor],
        *leaves: Tensor,
    ) -> Tensor:
        seen = [x]
        pairs = list(_pairs(leaves))
        for number, (weight, bias) in enumerate(pairs):
            x = _affine(x, weight, bias)
            if number < len(pairs) - 1:
                seen.append(activation(x))
        ctx.derivative = derivative
        ctx.save_for_backward(*seen, *leaves[::2])
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        layers = len(saved) // 2
        seen, weights = saved[:layers], saved[layers:]
        found: list[Tensor | None] = [None] * (2 * layers)
        wanted = ctx.needs_input_grad
        for i in reversed(range(layers)):
            if wanted[3 + 2 * i]:
                found[2 * i] = _weight_gradient(gradient, seen[i], weights[i])
            if wanted[4 + 2 * i]:
                found[2 * i + 1] = gradient.sum(-2)
            if i > 0:
                gradient = ctx.derivative(gradient @ weights[i], seen[i])
        first = None
        if wanted[0]:
            first = gradient @ weights[0]
            first = first if first.ndim == seen[0].ndim else first.sum(0)
        return first, None, None, *found


def _pairs(leaves: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(leaves[::2], leaves[1::2], strict=True)


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if x.is_floating_point():
        return gradient.mT @ x
    return torch.zeros_like(weight).scatter_add_(-1, x.expand_as(gradient.mT), gradient.mT)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not x.is_floating_point():
        return picked(weight, x).mT + bias.unsqueeze(-2)
    if weight.ndim == 2:
        return torch.addmm(bias, x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(-2), x.expand(len(weight), *x.shape[-2:]), weight.mT)
