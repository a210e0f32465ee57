"""Checks of the range of observed categories, which compiled code cannot make without a crash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from iql_torchrl import networks
from iql_torchrl.data.replay import DeviceSampler

__all__ = ["category_limits", "check_categories", "check_rows"]

Limits = Mapping[tuple[str, ...], int]


def category_limits(loss: Any) -> dict[tuple[str, ...], int]:
    """Keys that a loss's networks read as categories, on both sides of ``next``: how many."""
    limits: dict[tuple[str, ...], int] = {}
    for name in ("actor_network", "qvalue_network", "value_network"):
        for module in getattr(loss, name).modules():
            if not isinstance(module, TensorDictModule):
                continue
            first = getattr(module.module, "preprocess", None)
            if type(first) is networks.OneHot:
                keys = [_flat(key) for key in module.in_keys]
                limits[keys[0]] = first.num_classes
                if name == "value_network":
                    limits[("next", *keys[0])] = first.num_classes
    return limits


def check_categories(data: TensorDictBase, limits: Limits) -> None:
    """Raise ``ValueError`` on a category of ``data`` outside ``[0, limit)``."""
    for key, limit in limits.items():
        _check(key, data.get(key, None), limit)


def check_rows(rows: DeviceSampler, limits: Limits) -> None:
    """:func:`check_categories` for all rows of a sampler."""
    for key, limit in limits.items():
        _check(key, rows.column(key), limit)


def _check(key: tuple[str, ...], values: Tensor | None, limit: int) -> None:
    if values is None or not values.numel():
        return
    low, high = (int(value) for value in values.aminmax())
    if low < 0 or high >= limit:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{'.'.join(key)} has category {wrong}; expected whole numbers from 0 to {limit - 1}, "
            f"which networks.OneHot({limit}) reads. Build the networks for as many categories as "
            "the data hold."
        )


def _flat(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)
