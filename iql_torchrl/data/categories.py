"""Checks of the range of observed categories, which compiled code cannot make without a crash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from iql_torchrl import networks
from iql_torchrl.data.replay import DeviceSampler

__all__ = ["category_limits", "check_categories", "check_rows"]

Limits = Mapping[tuple[str, ...], int | tuple[int, ...]]


def category_limits(loss: Any) -> dict[tuple[str, ...], int | tuple[int, ...]]:
    """Keys that a loss's networks read as categories, on both sides of ``next``: how many.

    For several categories in one entry, the number of each column.
    """
    limits: dict[tuple[str, ...], int | tuple[int, ...]] = {}
    encoder = loss.encoder_network
    joined = getattr(encoder, "module", None)
    joined = getattr(joined, "preprocess", joined)  # of a network over windows
    if type(joined) is networks.JoinedEncoders:
        for name, each in zip(encoder.in_keys, joined.encoders, strict=False):
            key, count = _flat(name), _categories_of(each)
            limits |= {} if count is None else {key: count, ("next", *key): count}
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


def _categories_of(encoder: nn.Module) -> int | tuple[int, ...] | None:
    if type(encoder) is networks.OneHot:
        return encoder.num_classes
    return encoder.counts if type(encoder) is networks.OneHots else None


def _check(key: tuple[str, ...], values: Tensor | None, limit: int | tuple[int, ...]) -> None:
    if values is None or not values.numel():
        return
    columns = [values] if isinstance(limit, int) else values.reshape(-1, len(limit)).unbind(-1)
    counts = (limit,) if isinstance(limit, int) else limit
    for column, count in zip(columns, counts, strict=True):
        low, high = (int(value) for value in column.aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{'.'.join(key)} has category {wrong}; expected whole numbers from 0 to "
                f"{count - 1}, which networks.OneHot({count}) reads. Build the networks for as many "
                "categories as the data hold."
            )


def _flat(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)
