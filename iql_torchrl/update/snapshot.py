"""What a captured program took for granted, to be compared before each call of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.objectives.iql import OPTIONS
from iql_torchrl.update.step import NETWORKS, IQLStep


def fingerprint(step: IQLStep, rows: DeviceSampler, slots: Any, *, whole: bool) -> list[Any]:
    """All that a captured program took for granted; tensors by identity and place.

    ``slots``: state of the optimizer inside the program; ``whole``: the optimizer is written out
    in it, so that learning rates are tensors.
    """
    loss, updater = step.loss, step.target_updater
    groups = step.optimizer.param_groups
    tensors = [
        *(tensor for slot in slots for tensor in slot),
        *loss.parameters(),
        *loss.buffers(),
        *rows.tables,
        *step.targets,
        *(p for group in groups for p in group["params"]),
        *(group["rates"] for group in groups if "rates" in group),
    ]
    if not whole:
        states = step.optimizer.state.values()
        tensors += [x for state in states for x in state.values() if isinstance(x, Tensor)]
    return [
        None if whole else [group["lr"] for group in groups],
        *((tensor, tensor.data_ptr(), tensor.requires_grad) for tensor in tensors),
        *(options(group) for group in groups),
        *(getattr(loss, name) for name in (*loss.knobs, *OPTIONS)),
        loss.value_estimator,
        loss._kept,
        [dict(vars(x.tensor_keys)) for x in (loss, loss.value_estimator)],
        [m.training for name in NETWORKS for m in getattr(loss, name).modules()],
        (
            step.order,
            step.precision,
            step.max_grad_norm,
            type(updater),
            getattr(updater, "eps", None),
        ),
        (rows, rows.rows, rows.batch_size, rows.generator),
    ]


def options(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's group says besides parameters and rates."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr", "rates")}


def same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    """Equality, with tensors compared as objects."""
    if len(new) != len(old):
        return False
    for a, b in zip(new, old, strict=True):
        if isinstance(a, tuple) and a and isinstance(a[0], Tensor):
            if a[0] is not b[0] or a[1:] != b[1:]:
                return False
        elif a is not b and a != b:
            return False
    return True
