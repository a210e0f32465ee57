"""The learning rates of several coming updates, as ``captured`` needs them before it makes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iql_torchrl.private_apis import mark_stepped
from iql_torchrl.update.graph import is_on
from iql_torchrl.update.snapshot import options
from iql_torchrl.update.step import IQLStep

__all__ = ["coming_rates"]

Rates = list["float | Tensor"]


def coming_rates(step: IQLStep, updates: int) -> Tensor | None:
    """Step every schedule ``updates`` times; the learning rates before and after each time.

    Float64 ``(updates + 1, groups)``: row 0 is for the first update, the last row for the update
    after these. On the CPU, or on the parameters' device where a learning rate is a tensor: then
    nothing waits for the device. None where no schedule is.

    Raises ``ValueError`` where a schedule changes other settings of the optimizer; schedules and
    optimizer are then as before.
    """
    schedulers, groups = step.lr_schedulers, step.optimizer.param_groups
    if not schedulers:
        return None
    mark_stepped(step.optimizer)
    states = copy.deepcopy([scheduler.state_dict() for scheduler in schedulers])
    before = [options(group) for group in groups]
    rates = [_rates_of(groups, step.device)]
    for _ in range(updates):
        for scheduler in schedulers:
            scheduler.step()
        rates.append(_rates_of(groups, step.device))
    if before != [options(group) for group in groups]:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, settings, rate in zip(groups, before, rates[0], strict=True):
            group.update(settings)
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(torch.as_tensor(rate))
            else:
                group["lr"] = rate
        raise ValueError(
            "a schedule changes more than learning rates, which a captured update has fixed; "
            "pass cycle_momentum=False to OneCycleLR or CyclicLR, or use the plain step."
        )
    if any(isinstance(rate, Tensor) for rate in rates[0]):
        return torch.stack([_row(row, step.device) for row in rates])
    return torch.tensor(rates, dtype=torch.float64)


def _rates_of(groups: Sequence[dict[str, Any]], device: torch.device) -> Rates:
    """Numbers; copies of the tensors that are on ``device``, where reading a number would wait."""
    rates = [group["lr"] for group in groups]
    return [rate.clone() if is_on(rate, device) else float(rate) for rate in rates]


def _row(rates: Rates, device: torch.device) -> Tensor:
    row = torch.empty(len(rates), dtype=torch.float64, device=device)
    for place, rate in zip(row.unbind(), rates, strict=True):
        if isinstance(rate, Tensor):
            place.copy_(rate)
        else:
            place.fill_(rate)
    return row
