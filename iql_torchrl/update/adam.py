"""Adam for parameters that hold many runs: one learning rate a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["StackedAdam", "along"]


class StackedAdam(Optimizer):
    """Adam, or AdamW with ``decoupled=True``, on parameters ``(P, ...)`` of P runs.

    Adam is element-wise, so this is P optimizers (Kingma & Ba 2015; Loshchilov & Hutter 2019).
    Run ``i`` learns at ``lr * rates[i]``: schedulers move ``lr``, a factor common to all.

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
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rates = group["lr"] * group["rates"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                count = state["step"].to(rates.dtype)
                decay = group["weight_decay"]
                if decay and group["decoupled"]:
                    parameter.mul_(1 - along(rates * decay, parameter))
                elif decay:
                    gradient = gradient + decay * parameter
                average, square = state["exp_avg"], state["exp_avg_sq"]
                average.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = (1 - beta2**count).sqrt()
                size = along(rates / (1 - beta1**count), parameter)
                parameter.sub_(size * average / (square.sqrt() / root + group["eps"]))


def along(values: Tensor, parameter: Tensor) -> Tensor:
    """``values`` ``(P,)`` in the parameter's dtype, to multiply a ``(P, ...)`` tensor with."""
    return values.to(parameter.dtype).view(-1, *(1,) * (parameter.ndim - 1))


def _check(group: dict[str, Any]) -> None:
    rates = group["rates"]
    if not isinstance(rates, Tensor) or rates.ndim != 1 or not bool((rates > 0).all()):
        raise ValueError(f"rates is {rates}; wanted a tensor of positive numbers, one per run.")
    for parameter in group["params"]:
        if parameter.ndim == 0 or parameter.shape[0] != len(rates):
            raise ValueError(
                f"a parameter has shape {tuple(parameter.shape)} and there are {len(rates)} rates; "
                "wanted one per leading entry."
            )
    where = next((parameter.device for parameter in group["params"]), rates.device)
    group["rates"] = rates.to(where, torch.float32 if where.type == "mps" else torch.float64)
