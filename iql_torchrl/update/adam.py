"""Adam written out, for the compiled update and for parameters that hold many runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "JoinedCounts",
    "Moments",
    "StackedAdam",
    "adam_step",
    "add_update",
    "log_betas",
    "start",
]


class StackedAdam(Optimizer):
    """Adam, or AdamW with ``decoupled=True``, on parameters ``(P, ...)`` of P runs.

    Adam is element-wise, so this is P optimizers (Kingma & Ba 2015; Loshchilov & Hutter 2019).
    The learning rate of run ``i`` is ``lr * rates[i]``: schedulers change ``lr``, a common factor.

    Args:
        params: parameters or groups of them; a group may have its own ``rates``.
        rates: learning rates ``(P,)``, > 0.
        lr: factor, 1 by default.
        betas, eps, weight_decay: as in ``torch.optim.Adam``.

    Raises ``ValueError`` when a parameter's first dimension is not P, or a rate is not positive.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        rates: Tensor | None = None,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        defaults = {
            "rates": rates,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "capturable": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise TypeError("StackedAdam takes no closure.")
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        reached = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        states = [self.state[parameters[i]] for i in reached]
        for i, state in zip(reached, states, strict=True):
            start(state, parameters[i], parameters[i].device)
        moments = Moments(
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            torch.stack([state["step"] for state in states]),
            [group["lr"] for group in self.param_groups],
            [log_betas(group, group["rates"]) for group in self.param_groups],
        )
        adam_step(
            [parameters[i] for i in reached],
            [parameters[i].grad for i in reached],
            moments,
            self.param_groups,
            [group_of[i] for i in reached],
        )
        for state in states:
            state["step"].add_(1)


class Moments(NamedTuple):
    """What Adam keeps: three tensors per parameter, and two per group of parameters.

    ``averages`` and ``squares``: running means of the gradient and of its square; ``steps``: updates
    made, ``(N,)`` for N parameters; ``rates``: learning rates,
    numbers or tensors; ``logs``: :func:`log_betas`.
    """

    averages: list[Tensor]
    squares: list[Tensor]
    steps: Tensor
    rates: list[Any]
    logs: list[Tensor]


class JoinedCounts:
    """Counts of updates in one tensor, of which the ``"step"`` of each parameter's state is a view.

    Adding to all counts is then one operation, and one kernel on a GPU.
    """

    def __init__(self) -> None:
        self._joined = torch.zeros(0)
        self._views: list[Tensor] = []

    def of(self, states: Sequence[dict[str, Any]]) -> Tensor:
        """Counts ``(len(states),)``; joined again where a state has another tensor than before.

        They are on a GPU where the count of any of the states is.
        """
        counts = [state["step"] for state in states]
        views = self._views
        if len(counts) != len(views) or any(a is not b for a, b in zip(counts, views, strict=True)):
            where = next((c for c in counts if c.device.type != "cpu"), counts[0])
            self._joined = torch.stack([count.to(where) for count in counts])
            self._views = list(self._joined.unbind())
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view
        return self._joined


def start(state: dict[str, Any], parameter: Tensor, counted_on: torch.device) -> None:
    """Fill the empty ``state`` of a parameter, as torch's Adam does before the first update."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=counted_on)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def log_betas(group: Mapping[str, Any], like: Tensor) -> Tensor:
    """Logarithms of a group's two betas, ``(2,)``; minus infinity for 0."""
    logs = [math.log(beta) if beta else -math.inf for beta in group["betas"]]
    return torch.tensor(logs, dtype=like.dtype, device=like.device)


def adam_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    moments: Moments,
    groups: Sequence[Mapping[str, Any]],
    group_of: Sequence[int],
) -> None:
    """One step of Adam or AdamW in place, as torch's, on the parameters that have a gradient.

    Kingma & Ba 2015; Loshchilov & Hutter 2019 for decoupled weight decay. Parameter ``i`` belongs to
    ``groups[group_of[i]]``, which holds ``betas``, ``eps``, ``weight_decay`` and, for
    :class:`StackedAdam`, one factor of the learning rate per run in ``rates``. Called without
    gradients enabled, eagerly or inside a graph. Counts stay as they are, for :func:`add_update`.
    """
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if not reached:
        return
    counts = _counts_after(moments.steps, reached)
    rates = [
        rate * group["rates"] if "rates" in group else rate
        for rate, group in zip(moments.rates, groups, strict=True)
    ]
    numbers = [group_of[i] for i in reached]
    sizes, roots = _corrections(_of_each(rates, numbers), counts, _of_each(moments.logs, numbers))
    for i, size, root in zip(reached, sizes, roots, strict=True):
        parameter, gradient, group = parameters[i], gradients[i], groups[group_of[i]]
        assert gradient is not None
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        if decay and (group.get("decoupled") or group.get("decoupled_weight_decay")):
            parameter.mul_(1 - along(rates[group_of[i]] * decay, parameter))
        elif decay:
            gradient = gradient + decay * parameter
        average, square = moments.averages[i], moments.squares[i]
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = along(size, parameter)
        parameter.sub_(size * average / (square.sqrt() / root + group["eps"]))


def _counts_after(steps: Tensor, reached: Sequence[int]) -> Tensor:
    """Counts of the parameters ``reached`` after one more update, ``(len(reached),)``."""
    parts = [steps[first:end] for first, end in _consecutive(reached)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)) + 1


def add_update(steps: Tensor, reached: Sequence[int]) -> None:
    """Add 1 to the counts of the parameters ``reached``, in place."""
    for first, end in _consecutive(sorted(reached)):
        steps[first:end].add_(1)


def _consecutive(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges ``(first, end)`` of increasing numbers, ``end`` excluded."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


def _of_each(values: Sequence[Any], numbers: Sequence[int]) -> Tensor:
    """``values[number]`` for each of the numbers, stacked; a repeated value is not copied."""
    parts = [
        torch.as_tensor(values[number]).expand(len(list(same)), *values[number].shape)
        for number, same in groupby(numbers)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _corrections(rate: Tensor, count: Tensor, logs: Tensor) -> tuple[Sequence[Tensor], ...]:
    """Step sizes, and roots of the second bias correction, of N parameters.

    ``rate`` is ``(N,)`` or ``(N, P)``, ``count`` ``(N,)``, ``logs`` ``(N, 2)``. Powers are written as
    exponentials of one tensor: Inductor stores that once, and would compute ``beta**count`` again
    for every element of every parameter.
    """
    remaining = 1 - (count.to(logs).unsqueeze(-1) * logs).exp()
    first, second = remaining.unbind(-1)
    sizes = rate / (first if rate.ndim == 1 else first.unsqueeze(-1))
    return sizes.unbind(), second.sqrt().unbind()


def along(values: Tensor, parameter: Tensor) -> Tensor:
    """``values`` ``(P,)`` in the parameter's dtype, to multiply a ``(P, ...)`` tensor with.

    One value for all runs, ``()``, stays as it is.
    """
    if values.ndim == 0:
        return values
    return values.to(parameter.dtype).view(-1, *(1,) * (parameter.ndim - 1))


def _check(group: dict[str, Any]) -> None:
    rates = group["rates"]
    if not isinstance(rates, Tensor) or rates.ndim != 1 or not bool((rates > 0).all()):
        raise ValueError(f"rates is {rates}; expected a tensor of positive numbers, one per run.")
    for parameter in group["params"]:
        if parameter.ndim == 0 or parameter.shape[0] != len(rates):
            raise ValueError(
                f"a parameter has shape {tuple(parameter.shape)} and there are {len(rates)} rates; "
                "give one per entry of the first dimension."
            )
    where = next((parameter.device for parameter in group["params"]), rates.device)
    group["rates"] = rates.to(where, torch.float32 if where.type == "mps" else torch.float64)
