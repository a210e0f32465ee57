"""Adam written out, for compiled updates and for parameters that hold many runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from iql_torchrl.config import number_dtype


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
        settings = {"rates": rates, "lr": lr, "betas": betas, "eps": eps}
        settings |= {"weight_decay": weight_decay, "decoupled": decoupled, "capturable": True}
        super().__init__(params, settings)

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
        groups = self.param_groups
        group_of = [i for i, g in enumerate(groups) for p in g["params"] if p.grad is not None]
        reached = [p for group in groups for p in group["params"] if p.grad is not None]
        states = [start(self.state[p], p, p.device) for p in reached]
        if states:
            counts = torch.stack([state["step"] for state in states])
            moments = Moments.of(states, counts, [group["lr"] for group in groups])
            gradients = [p.grad for p in reached]
            adam_step(reached, gradients, moments, groups, group_of, [0] * len(reached))
        for state in states:
            state["step"] += 1


class Moments(NamedTuple):
    """What Adam keeps of N parameters.

    ``averages`` and ``squares``: running means of the gradient and of its square; ``steps``: updates
    made, ``(N,)``; ``rates``: the learning rates of the groups of parameters, a tensor or numbers.
    """

    averages: list[Tensor]
    squares: list[Tensor]
    steps: Tensor
    rates: Any

    @classmethod
    def of(cls, states: Sequence[Mapping[str, Tensor]], steps: Tensor, rates: Any) -> Moments:
        averages, squares = ([state[k] for state in states] for k in ("exp_avg", "exp_avg_sq"))
        return cls(averages, squares, steps, rates)


class JoinedCounts:
    """Counts of updates in one tensor, of which the ``"step"`` of each parameter's state is a view.

    Writing all counts is then one operation, and one kernel on a GPU.
    """

    def __init__(self) -> None:
        self._joined = torch.zeros(0)
        self._views: list[Tensor] = []

    def of(self, states: Sequence[dict[str, Any]]) -> Tensor:
        """Counts ``(len(states),)``; joined again where a state has another tensor than before.

        They are on a GPU where the count of any of the states is.
        """
        counts = [state["step"] for state in states]
        if len(counts) != len(self._views) or any(map(is_not, counts, self._views)):
            where = next((c for c in counts if c.device.type != "cpu"), counts[0])
            self._joined = torch.stack([count.to(where) for count in counts])
            self._views = list(self._joined.unbind())
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view
        return self._joined


def start(state: dict[str, Any], parameter: Tensor, counted_on: torch.device) -> dict[str, Any]:
    """The ``state`` of a parameter, filled as torch's Adam does before the first update."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=counted_on)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def adam_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    moments: Moments,
    groups: Sequence[Mapping[str, Any]],
    group_of: Sequence[int],
    added: list[int],
) -> None:
    """One step of Adam or AdamW in place, as torch's, on the parameters that have a gradient.

    Kingma & Ba 2015; Loshchilov & Hutter 2019 for decoupled weight decay. Parameter ``i`` belongs to
    ``groups[group_of[i]]``, which holds ``betas``, ``eps``, ``weight_decay`` and, for
    :class:`StackedAdam`, one factor of the learning rate per run in ``rates``. Called without
    gradients enabled, eagerly or inside a graph.

    ``added``: steps of each parameter that ``moments.steps`` does not count; this one is added here.
    :func:`count_steps` counts them all at once, after the last descent of an update.
    """
    for i, gradient in enumerate(gradients):
        added[i] += gradient is not None
    for (number, more), places in _consecutive(list(zip(group_of, added, strict=True))):
        group, counts = groups[number], moments.steps[places.start : places.stop] + more
        rate, decay = moments.rates[number], group["weight_decay"]
        rate = rate * group["rates"] if "rates" in group else rate
        decoupled = group.get("decoupled") or group.get("decoupled_weight_decay")
        beta1, beta2 = group["betas"]
        for i, size, root in zip(places, *_corrections(rate, counts, beta1, beta2), strict=True):
            parameter, gradient = parameters[i], gradients[i]
            if gradient is None:
                continue
            if decay and decoupled:
                parameter.mul_(1 - along(rate * decay, parameter))
            elif decay:
                gradient = gradient + decay * parameter
            average, square = moments.averages[i], moments.squares[i]
            average.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            size = along(size, parameter)
            parameter.sub_(size * average / (square.sqrt() / root + group["eps"]))


def count_steps(steps: Tensor, added: Sequence[int]) -> None:
    """Add to the counts of updates ``(N,)``, in place; one operation where all made as many."""
    for more, places in _consecutive(added):
        if more:
            steps[places.start : places.stop].add_(more)


def _consecutive(values: Sequence[Any]) -> list[tuple[Any, range]]:
    """Each value of consecutive equal ones, and their places."""
    groups: list[tuple[Any, range]] = []
    for i, value in enumerate(values):
        if groups and groups[-1][0] == value:
            groups[-1] = (value, range(groups[-1][1].start, i + 1))
        else:
            groups.append((value, range(i, i + 1)))
    return groups


def _corrections(rate: Tensor, counts: Tensor, *betas: float) -> list[Sequence[Tensor]]:
    """Step sizes, and roots of the second bias correction, of n parameters.

    ``rate`` is ``()`` or ``(P,)``, ``counts`` ``(n,)``. Powers are written as exponentials of one
    tensor, which a compiled program computes once. It would compute ``beta**count`` for each element
    of each parameter.
    """
    exact = counts.to(rate.device, number_dtype(rate.device))
    logs = (math.log(beta) if beta else -math.inf for beta in betas)
    first, second = (1 - (exact * log).exp() for log in logs)
    sizes = rate / (first if rate.ndim == 0 else first.unsqueeze(-1))
    return [sizes.unbind(), second.sqrt().unbind()]


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
    group["rates"] = rates.to(where, number_dtype(where))
