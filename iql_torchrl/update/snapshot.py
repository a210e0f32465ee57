"""What a captured program has fixed, to be compared before each call of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iql_torchrl.config import Arithmetic
from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.losses import OPTIONS
from iql_torchrl.update.adam import Moments
from iql_torchrl.update.step import IQLStep


@dataclass(frozen=True)
class Snapshot:
    """Everything that a captured program has fixed.

    ``tensors``: each with its address and whether it is trained; compared as objects. ``settings``:
    compared by value.
    """

    tensors: tuple[tuple[Tensor, int, bool], ...]
    settings: tuple[Any, ...]

    def same(self, other: Snapshot) -> bool:
        """Whether a program made for one may be called for the other."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(
                a[0] is b[0] and a[1:] == b[1:]
                for a, b in zip(self.tensors, other.tensors, strict=True)
            )
            and len(self.settings) == len(other.settings)
            and all(a is b or a == b for a, b in zip(self.settings, other.settings, strict=True))
        )


def take_snapshot(step: IQLStep, rows: DeviceSampler, moments: Moments) -> Snapshot:
    """The snapshot of ``step`` as it is now, sampling from ``rows``, with the optimizer's state."""
    loss, updater = step.loss, step.target_updater
    groups = step.optimizer.param_groups
    tensors = [
        *moments.averages,
        *moments.squares,
        moments.steps,
        *moments.rates,
        *moments.logs,
        *loss.parameters(),
        *loss.buffers(),
        *rows.tables,
        *step.followed.targets,
        *step.averaged.targets,
        *(p for group in groups for p in group["params"]),
        *(group["rates"] for group in groups if "rates" in group),
    ]
    settings = [
        *(options(group) for group in groups),
        *(getattr(loss, name) for name in (*loss.knobs, *OPTIONS)),
        loss.value_estimator,
        loss.kept_networks,
        [dict(vars(x.tensor_keys)) for x in (loss, loss.value_estimator)],
        [m.training for name in loss.network_names for m in getattr(loss, name).modules()],
        bool(step.lr_schedulers),  # whether updates read learning rates of their own
        (step.order, step.precision, step.max_grad_norm, step.ranks),
        (type(updater), getattr(updater, "eps", None)),
        (rows, rows.rows, rows.batch_size, rows.generator),
        _kernel_choice(step.device.type),
    ]
    return Snapshot(tuple((t, t.data_ptr(), t.requires_grad) for t in tensors), tuple(settings))


def _kernel_choice(device_type: str) -> tuple[Any, ...]:
    """torch's settings that decide which kernels a program holds: precision, determinism, autocast."""
    arithmetic, matmul, cudnn = (
        Arithmetic.current(),
        torch.backends.cuda.matmul,
        torch.backends.cudnn,
    )
    autocast: tuple[Any, ...] = ()
    if torch.amp.is_autocast_available(device_type):
        autocast = (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
    return (
        (arithmetic.dtype, arithmetic.determinism, arithmetic.precisions),
        (matmul.allow_bf16_reduced_precision_reduction, cudnn.deterministic, cudnn.benchmark),
        (matmul.allow_fp16_reduced_precision_reduction, torch.is_autocast_cache_enabled()),
        autocast,
    )


def options(group: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's group without its parameters and learning rates."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr", "rates")}
