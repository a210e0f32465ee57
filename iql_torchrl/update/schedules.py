"""The learning rates of several coming updates, as ``captured`` needs them before it makes them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from iql_torchrl.host import mark_stepped
from iql_torchrl.update.graph import current_rates, rate_table
from iql_torchrl.update.snapshot import options
from iql_torchrl.update.step import IQLStep

__all__ = ["coming_rates"]


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
    rates = [current_rates(step.optimizer, step.device)]
    for _ in range(updates):
        for scheduler in schedulers:
            scheduler.step()
        rates.append(current_rates(step.optimizer, step.device))
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
    return rate_table(rates, step.device)
