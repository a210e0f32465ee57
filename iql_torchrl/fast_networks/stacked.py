"""Networks of P runs as one: the same modules over parameters with a leading dimension."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from iql_torchrl import networks
from iql_torchrl.fast_networks.dense import check_picks, is_sequential, picked
from iql_torchrl.fast_networks.detect import WRAPPERS, is_known, pick_first
from iql_torchrl.host import children_of, parameters_of

__all__ = ["StackedNetwork", "check_networks", "check_same", "perceptron_keys"]

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
CONTAINERS = (nn.Sequential, nn.ModuleList)


def perceptron_keys(name: str, network: nn.Module) -> set[NestedKey]:
    """Keys of the parameters inside the network's perceptrons.

    Raises ``ValueError`` on what cannot be stacked: anything but this package's networks and
    policies, and plain Sequentials of Linear, LayerNorm, Dropout and element-wise activations.
    """
    perceptrons = {p: m for p, m in network.named_modules() if _is_perceptron(m)}
    inside = {part for module in perceptrons.values() for part in module.modules()}
    for path, module in _culprits_first(network):
        ours = type(module).__module__ in ("iql_torchrl.networks", "iql_torchrl.policies")
        plain = ours or type(module) in (*WRAPPERS, *CONTAINERS, *ELEMENTWISE)
        if not is_known(module) or not (plain or module in inside):
            raise ValueError(
                f"{name} holds {path!r}, a {type(module).__name__}, which cannot be stacked; train "
                "its runs one by one, or build it from iql_torchrl.networks, iql_torchrl.policies "
                "or plain Sequentials of Linear, LayerNorm, Dropout and element-wise activations."
            )
        if type(module) is networks.Critic and any(True for _ in module.preprocess.parameters()):
            raise ValueError(
                f"{name}'s {path}.preprocess has parameters, and a critic joins what it gives with "
                "the action, which has none; let the critic see the observations as they are."
            )
    return {
        _key(path, key)
        for path, module in perceptrons.items()
        for key, _ in module.named_parameters()
    }


def check_networks(number: int, first: Any, loss: Any, names: Sequence[str]) -> None:
    """Raise ``ValueError`` where networks of ``losses[number]`` differ from the first loss's.

    They may differ in weights alone, and none may share parameters with another.
    """
    held = [leaf for name in names for leaf in _leaves(loss, name).values()]
    trained = [id(leaf) for leaf in held if isinstance(leaf, nn.Parameter)]
    if loss._shared.trunk or len(set(trained)) < len(trained):
        raise ValueError(
            f"losses[{number}]'s networks share parameters, a trunk or tied layers; in a population "
            "every network has its own."
        )
    for name in names:
        mine, theirs = (_leaves(x, name) for x in (first, loss))
        for key in {**mine, **theirs}:
            shapes = [tuple(x[key].shape) if key in x else None for x in (theirs, mine)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name}'s {key} has shape {shapes[0]} in losses[{number}] and {shapes[1]} in "
                    "the first: networks of different shapes are not stacked. Train one population "
                    "for each shape."
                )
            what = "frozen parameter" if isinstance(mine[key], nn.Parameter) else "buffer"
            told = ["trained" if x[key].requires_grad else what for x in (mine, theirs)]
            check_same(number, f"{name}'s {key}", *told)
        for one, other in zip_longest(*(_outline(getattr(x, name)) for x in (first, loss))):
            check_same(number, f"a module of {name}", one, other)


def check_same(number: int, name: str, wanted: object, found: object) -> None:
    if wanted != found:
        raise ValueError(f"{name} is {found!r} in losses[{number}] and {wanted!r} in the first.")


def _leaves(loss: Any, name: str) -> dict[str, Tensor]:
    return {str(key): leaf for key, leaf in children_of(loss)[f"{name}_params"].items(True, True)}


def _outline(network: nn.Module) -> list[tuple[str, ...]]:
    """What a network is but for its weights: places, kinds, settings and keys of its modules."""
    about = ("in_keys", "out_keys", "distribution_class")
    return [
        (path, f"{type(m).__name__}({m.extra_repr()})", *(str(getattr(m, a, "")) for a in about))
        for path, m in network.named_modules()
    ]


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
                setattr(self.module.get_submodule(parent), child, body)
                if type(body.layers[0]) is nn.Linear:
                    pick_first(self.module.get_submodule(parent), _Perceptron)
        dims = params.batch_dims
        for path, module in self.module.named_modules():
            if "layers" in path.split("."):
                continue
            table = parameters_of(module)
            for key in [k for k, p in table.items() if p is not None]:
                table[key] = params.get(_key(path, key))
            for key in [k for k, _ in module.named_buffers(recurse=False)]:
                stacked = params.get(_key(path, key)).flatten(0, dims - 1)
                if not bool((stacked == stacked[:1]).all()):
                    raise ValueError(
                        f"{name}'s {path}.{key} differs between the runs; a population shares the "
                        "data, so statistics and bounds must be the same."
                    )
                setattr(module, key, stacked[0])

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
    """A Sequential over stacked parameters: ``(B, in)`` or ``(P, B, in)`` to ``(P, [K,] B, out)``.

    With ``picks``, categories ``(B,)`` or ``(P, B)`` stand for their one-hot form.
    """

    def __init__(self, source: Any, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.picks = False
        self.layers = nn.ModuleList(_layers(source))
        rest = list(leaves)
        self.leaves = []
        for layer in self.layers:
            count = sum(1 for _ in layer.parameters(recurse=False))
            self.leaves.append(tuple(rest[:count]))
            rest = rest[count:]
            parameters_of(layer).clear()

    def forward(self, *inputs: Tensor) -> Tensor:
        """On columns, ``(..., n, B)``: gradients of weights then have the weights' own layout."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        check_picks(x, self.picks)
        x = x.mT if x.is_floating_point() else x
        for layer, leaves in zip(self.layers, self.leaves, strict=True):
            if isinstance(layer, nn.Linear):
                x = _linear(x, *leaves)
            elif isinstance(layer, nn.LayerNorm):
                x = nn.functional.layer_norm(x.mT, layer.normalized_shape, eps=layer.eps).mT
                if leaves:
                    x = _widened(x, leaves[0].ndim + 1) * leaves[0].unsqueeze(-1)
                if len(leaves) > 1:
                    x = x + leaves[1].unsqueeze(-1)
            else:
                x = layer(x)
        return x.mT


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not x.is_floating_point():
        x = picked(weight, x)
    elif x.ndim == 2:  # one input for all: one product
        x = (weight.flatten(0, -2) @ x).unflatten(0, weight.shape[:-1])
    else:
        x = _widened(x, weight.ndim)
        if weight.shape[-2] == 1 and torch.compiler.is_compiling():
            x = (weight.mT * x).sum(-2, keepdim=True)
        else:
            x = weight @ x
    return x if bias is None else x + bias.unsqueeze(-1)


def _widened(x: Tensor, ndim: int) -> Tensor:
    """``(P, n, B)`` with a dimension for the K critics of a run; ``(n, B)``, for all, as it is."""
    return x.unsqueeze(1) if 2 < x.ndim < ndim else x


def _layers(source: nn.Sequential) -> list[Any]:
    """In the order they run; ``children()`` names a module once, however often it runs."""
    return list(source)


def _is_perceptron(module: nn.Module) -> bool:
    if not is_sequential(module):
        return False
    parts = _layers(module)
    linear = any(type(part) is nn.Linear for part in parts)
    return linear and all(
        type(p) in (nn.Linear, *ELEMENTWISE)
        or (type(p) is nn.LayerNorm and len(p.normalized_shape) == 1)
        for p in parts
    )


def _culprits_first(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """A Linear is no culprit: it stands beside what keeps its Sequential from being stacked."""
    kinds = (nn.LayerNorm, nn.Linear)
    return sorted(
        network.named_modules(),
        key=lambda item: kinds.index(type(item[1])) if type(item[1]) in kinds else -1,
    )


def _key(path: str, name: str) -> NestedKey:
    return tuple(f"{path}.{name}".removeprefix(".").split("."))
