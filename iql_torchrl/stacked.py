"""Networks of P runs as one: the same modules over parameters with a leading dimension."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.modules import MLP as TorchRLMLP

from iql_torchrl.bound import is_known
from iql_torchrl.networks import MLP

__all__ = ["StackedNetwork", "perceptron_keys"]

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


def perceptron_keys(name: str, network: nn.Module) -> set[NestedKey]:
    """Keys of the parameters inside the network's perceptrons.

    Raises ``ValueError`` on what cannot be stacked: anything but this package's networks and
    policies, and plain Sequentials of Linear, LayerNorm, Dropout and element-wise activations.
    """
    for path, module in network.named_modules():
        if not is_known(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} holds {path!r}, a {type(module).__name__}, which cannot be stacked; train "
                "its runs one by one, or build it from iql_torchrl.networks, iql_torchrl.policies "
                "or plain Sequentials."
            )
    return {
        tuple(f"{path}.{key}".split("."))
        for path, module in network.named_modules()
        if _is_perceptron(module)
        for key, _ in module.named_parameters()
    }


class StackedNetwork:
    """One network of P runs: outputs get the leading dimensions of its parameters.

    ``params``: the network's parameters, ``(P, ...)`` or ``(P, K, ...)`` inside perceptrons and
    ``(P, 1, ...)`` elsewhere. Inputs are ``(B, ...)``, the same for every run, or ``(P, B, ...)``.
    Raises ``ValueError`` when buffers (statistics, bounds) differ between the runs.
    """

    def __init__(self, name: str, network: nn.Module, params: TensorDictBase) -> None:
        self.module: Any = copy.deepcopy(network)
        self._modes = list(zip(network.modules(), self.module.modules(), strict=True))
        for path, original in network.named_modules():
            if _is_perceptron(original):
                leaves = [params.get(_key(path, k)) for k, _ in original.named_parameters()]
                parent, _, child = path.rpartition(".")
                body = _Perceptron(self.module.get_submodule(path), leaves)
                self.module.get_submodule(parent)._modules[child] = body
        dims = params.batch_dims
        for path, module in self.module.named_modules():
            if "layers" in path.split("."):
                continue
            for key in [k for k, p in module._parameters.items() if p is not None]:
                module._parameters[key] = params.get(_key(path, key))
            for key in list(module._buffers):
                stacked = params.get(_key(path, key)).flatten(0, dims - 1)
                if not bool((stacked == stacked[:1]).all()):
                    raise ValueError(
                        f"{name}'s {path}.{key} differs between the runs; a population shares the "
                        "data, so statistics and bounds must be the same."
                    )
                module._buffers[key] = stacked[0]

    def follow_modes(self) -> None:
        """Training or evaluation mode as the original has it."""
        for original, clone in self._modes:
            if clone.training is not original.training:
                clone.training = original.training

    def __call__(self, data: TensorDictBase) -> Tensor:
        """Output of a TensorDictModule with one plain module and one out-key."""
        out: Tensor = self.module.module(*[data.get(key) for key in self.module.in_keys])
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


class _Perceptron(nn.Module):
    """A Sequential over stacked parameters: ``(B, in)`` or ``(P, B, in)`` to ``(P, [K,] B, out)``."""

    def __init__(self, source: nn.Module, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(source.children())
        rest = list(leaves)
        self.leaves = []
        for layer in self.layers:
            count = sum(p is not None for p in layer._parameters.values())
            self.leaves.append(tuple(rest[:count]))
            rest = rest[count:]
            layer._parameters.clear()

    def forward(self, *inputs: Tensor) -> Tensor:
        """On columns, ``(..., n, B)``: gradients of weights then have the weights' own layout."""
        x = (inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)).mT
        for layer, leaves in zip(self.layers, self.leaves, strict=True):
            if isinstance(layer, nn.Linear):
                x = _linear(x, *leaves)
            elif isinstance(layer, nn.LayerNorm):
                x = nn.functional.layer_norm(x.mT, layer.normalized_shape, eps=layer.eps).mT
                for leaf, combine in zip(leaves, (torch.mul, torch.add), strict=False):
                    x = combine(x, leaf.unsqueeze(-1))
            else:
                x = layer(x)
        return x.mT


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.ndim == 2:  # one input for all: one product
        x = (weight.flatten(0, -2) @ x).unflatten(0, weight.shape[:-1])
    else:
        while x.ndim < weight.ndim:
            x = x.unsqueeze(1)
        if weight.shape[-2] == 1 and torch.compiler.is_compiling():
            x = (weight.mT * x).sum(-2, keepdim=True)
        else:
            x = weight @ x
    return x if bias is None else x + bias.unsqueeze(-1)


def _is_perceptron(module: nn.Module) -> bool:
    if type(module) not in (nn.Sequential, MLP, TorchRLMLP) or getattr(
        module, "_reshape_out", False
    ):
        return False
    parts = list(module.children())
    linear = any(type(part) is nn.Linear for part in parts)
    return linear and all(type(p) in (nn.Linear, nn.LayerNorm, *ELEMENTWISE) for p in parts)


def _key(path: str, name: str) -> NestedKey:
    return tuple(f"{path}.{name}".removeprefix(".").split("."))
