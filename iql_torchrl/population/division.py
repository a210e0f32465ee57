"""The runs of a population that ranks divide among them: joining their states, and taking a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

States = Mapping[str, Any]


def joined_states(parts: Sequence[States], loss: States) -> dict[str, Any]:
    """``"loss_module"`` and ``"step"`` of all runs, from those of the ranks' runs in order.

    ``loss``: the state of a loss of all runs, for the shapes: what the runs share is not joined.
    """

    def of_loss(name: str) -> Any:
        first, shape = parts[0]["loss_module"][name], loss[name]
        if not isinstance(first, Tensor) or first.shape == shape.shape:
            return loss[name] if not isinstance(first, Tensor) else first
        return torch.cat([part["loss_module"][name] for part in parts])

    def of_step(*values: Any) -> Any:
        of_runs = isinstance(values[0], Tensor) and values[0].ndim > 0
        return torch.cat(values) if of_runs else values[0]

    step = _mapped(of_step, *(part["step"] for part in parts))
    return {"loss_module": {name: of_loss(name) for name in loss}, "step": step}


def part_of_states(states: States, loss: States, runs: range) -> dict[str, Any]:
    """``"loss_module"`` and ``"step"`` of the runs numbered ``runs``, from those of all runs.

    ``loss``: the state of a loss of these runs, for the shapes.
    """

    def of_loss(name: str) -> Any:
        value, own = states["loss_module"][name], loss[name]
        if not isinstance(value, Tensor):
            return own
        return value if value.shape == own.shape else value[runs.start : runs.stop]

    def of_step(value: Any) -> Any:
        of_runs = isinstance(value, Tensor) and value.ndim > 0
        return value[runs.start : runs.stop].clone() if of_runs else value

    step = _mapped(of_step, states["step"])
    return {"loss_module": {name: of_loss(name) for name in loss}, "step": step}


def to_cpu(states: Any) -> Any:
    """Nested states with all tensors on the CPU, as they are sent to other processes."""
    return _mapped(lambda value: value.cpu() if isinstance(value, Tensor) else value, states)


def _mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of the leaves at the same place of nested dicts, lists and tuples."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: _mapped(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_mapped(function, *leaves) for leaves in zip(*trees, strict=True))
    return function(*trees)
