"""Networks of P runs as one: the same modules over parameters with a leading dimension."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from iql_torchrl import networks
from iql_torchrl.fast_networks.detect import OWN, WRAPPERS, is_known, pick_first
from iql_torchrl.fast_networks.evaluator import entry_key, follow_modes, hold_parameters
from iql_torchrl.fast_networks.perceptron import ELEMENTWISE, Perceptron, is_stackable
from iql_torchrl.host import children_of

__all__ = ["StackedNetwork", "check_networks", "check_same", "perceptron_keys"]

CONTAINERS = (nn.Sequential, nn.ModuleList)


def perceptron_keys(name: str, network: nn.Module) -> set[NestedKey]:
    """Keys of the parameters inside the network's perceptrons.

    Raises ``ValueError`` on what cannot be stacked: anything but this package's networks and
    policies, and plain Sequentials of Linear, LayerNorm, Dropout and element-wise activations.
    """
    perceptrons = {p: m for p, m in network.named_modules() if is_stackable(m)}
    inside = {part for module in perceptrons.values() for part in module.modules()}
    for path, module in _causes_first(network):
        plain = type(module) in (*OWN, *WRAPPERS, *CONTAINERS, *ELEMENTWISE)
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
        entry_key(path, key)
        for path, module in perceptrons.items()
        for key, _ in module.named_parameters()
    }


def check_networks(number: int, first: Any, loss: Any, names: Sequence[str]) -> None:
    """Raise ``ValueError`` where networks of ``losses[number]`` differ from the first loss's.

    They may differ in weights alone, and none may share parameters with another.
    """
    leaves = [leaf for name in names for leaf in _leaves(loss, name).values()]
    trained = [id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)]
    if loss.shared.trunk or len(set(trained)) < len(trained):
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
            other = "frozen parameter" if isinstance(mine[key], nn.Parameter) else "buffer"
            roles = ["trained" if x[key].requires_grad else other for x in (mine, theirs)]
            check_same(number, f"{name}'s {key}", *roles)
        for one, another in zip_longest(*(_outline(getattr(x, name)) for x in (first, loss))):
            check_same(number, f"a module of {name}", one, another)


def check_same(number: int, name: str, first: object, other: object) -> None:
    """Raise ``ValueError`` where ``name`` of ``losses[number]`` differs from the first loss's."""
    if first != other:
        raise ValueError(f"{name} is {other!r} in losses[{number}] and {first!r} in the first.")


def _leaves(loss: Any, name: str) -> dict[str, Tensor]:
    return {str(key): leaf for key, leaf in children_of(loss)[f"{name}_params"].items(True, True)}


def _outline(network: nn.Module) -> list[tuple[str, ...]]:
    """Paths, classes, settings and keys of a network's modules: all of it except the weights."""
    names = ("in_keys", "out_keys", "distribution_class")
    return [
        (path, f"{type(m).__name__}({m.extra_repr()})", *(str(getattr(m, n, "")) for n in names))
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
            if is_stackable(original):
                self._replace(path, original, params)
        hold_parameters(self.module, params)
        dims = params.batch_dims
        for path, module in self.module.named_modules():
            for key in [k for k, _ in module.named_buffers(recurse=False)]:
                stacked = params.get(entry_key(path, key)).flatten(0, dims - 1)
                if not bool((stacked == stacked[:1]).all()):
                    raise ValueError(
                        f"{name}'s {path}.{key} differs between the runs; a population shares the "
                        "data, so statistics and bounds must be the same."
                    )
                setattr(module, key, stacked[0])

    def _replace(self, path: str, original: nn.Module, params: TensorDictBase) -> None:
        """Put a perceptron over the stacked parameters in the place of the one at ``path``."""
        leaves = [params.get(entry_key(path, key)) for key, _ in original.named_parameters()]
        parent_path, _, child = path.rpartition(".")
        parent, source = (self.module.get_submodule(p) for p in (parent_path, path))
        body = Perceptron(source, leaves, per_run=True)
        setattr(parent, child, body)
        if type(body.layers[0]) is nn.Linear:
            pick_first(parent)

    def follow_modes(self) -> None:
        """Set training or evaluation mode as the original network has it."""
        follow_modes(self._modes)

    def __call__(self, data: TensorDictBase) -> Tensor:
        """Output of a TensorDictModule with one plain module and one out-key."""
        out: Tensor = self.module.module(*[data.get(key) for key in self.module.in_keys])
        return out


def _causes_first(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with Linear and LayerNorm last: another part keeps their Sequential from stacking."""
    kinds = (nn.LayerNorm, nn.Linear)
    return sorted(
        network.named_modules(),
        key=lambda item: kinds.index(type(item[1])) if type(item[1]) in kinds else -1,
    )
