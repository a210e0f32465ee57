"""Checks of an exported program's inputs, as operations of the program itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from iql_torchrl.descriptions import bounds_in_words
from iql_torchrl.evaluation.act import whole_limits
from iql_torchrl.private_apis import assert_dtype, assert_later

__all__ = ["HISTORY_VALUES", "MASK_VALUES", "assert_history", "assert_values", "values_in_words"]

MASK_VALUES = "at least one True in every row"
HISTORY_VALUES = (
    "in every row False at padding and then True at the real steps, the last one included"
)


def values_in_words(space: spaces.Space[Any]) -> str:
    """The values that ``space`` allows, in words that follow "must hold"."""
    limits = whole_limits(space)
    return "finite numbers" if limits is None else f"whole numbers in {bounds_in_words(*limits)}"


def assert_values(
    name: str, values: Tensor, space: spaces.Space[Any] | None, dtype: torch.dtype
) -> None:
    """Assert the dtype and the values of the input ``name``; ``space=None`` is an action mask.

    Run eagerly or traced by ``torch.export``: then the program raises ``RuntimeError`` with the
    same message. The exported program checks shapes itself.
    """
    assert_dtype(values, dtype)
    if space is None:
        assert_later(values.any(-1).all(), f"{name} must hold {MASK_VALUES}.")
        return
    message = f"{name} must hold {values_in_words(space)}."
    limits = whole_limits(space)
    if limits is None:
        assert_later(values.isfinite().all(), message)
    elif not _is_whole_dtype(*limits, dtype):
        low, high = (_constant(limit) for limit in limits)
        assert_later(((values >= low) & (values <= high)).all(), message)


def assert_history(name: str, mask: Tensor) -> None:
    """As :func:`assert_values`, of the mask ``(B, T)`` of windows."""
    assert_dtype(mask, torch.bool)
    rising = (mask[:, 1:] | ~mask[:, :-1]).all() & mask[:, -1].all()
    assert_later(rising, f"{name} must hold {HISTORY_VALUES}.")


def _is_whole_dtype(low: Any, high: Any, dtype: torch.dtype) -> bool:
    """Whether the limits are those of the dtype itself, so that every value is within them."""
    if dtype == torch.bool:
        return True
    info = torch.iinfo(dtype)
    return bool(np.all(low == info.min) and np.all(high == info.max))


def _constant(limit: Any) -> int | Tensor:
    """A number if it is the same in all dimensions, so that the program needs no tensor for it."""
    values = np.unique(limit)
    return int(values[0]) if values.size == 1 else torch.as_tensor(np.asarray(limit))
