"""Keys and layout of transitions, and errors.

Rows follow TorchRL's "next" layout. Keys are tuples inside this package: ``("observation",)``
or ``("observation", name)`` for Dict observations, ``("action",)``, ``("next", "reward")``, ...
A row's reward and flags are those of the step that left ``observation`` through ``action``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

Key: TypeAlias = tuple[str, ...]

REWARD: Key = ("next", "reward")
TERMINATED: Key = ("next", "terminated")
TRUNCATED: Key = ("next", "truncated")
DONE: Key = ("next", "done")
EPISODE: Key = ("collector", "traj_ids")
ACTION: Key = ("action",)
MASK: Key = ("action_mask",)
NEXT_MASK: Key = ("next", "action_mask")
LOG_PROB: Key = ("action_log_prob",)


class DatasetError(ValueError):
    """The data cannot be used; the message names the place and what to do."""


class MissingPackageError(DatasetError, ImportError):
    """An optional package is missing, which the data need; the message says how to install it."""


class DatasetWarning(UserWarning):
    """The data can be used, but something in it may be wrong and should be checked."""


class Field(NamedTuple):
    """Shape of one row and the dtype in which it is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Layout: TypeAlias = dict[Key, Field]


def nested(leaves: Mapping[Key, Any], group: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """Leaves by key as ``group`` of ``group``; the key ``()`` is a single leaf."""
    if () in leaves:
        return leaves[()]
    inner: dict[str, dict[Key, Any]] = {}
    for key, value in leaves.items():
        inner.setdefault(key[0], {})[key[1:]] = value
    return group({name: nested(each, group) for name, each in inner.items()})


def dotted(key: Key) -> str:
    return ".".join(key)
