"""Checks of ``load_dataset``'s options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import gymnasium as gym
import torch

from iql_torchrl.data.scaling import REFERENCE_RETURNS
from iql_torchrl.data.schema import DatasetError

__all__ = ["check_options", "check_spaces", "known_scores"]


def check_spaces(observation_space: Any, action_space: Any) -> None:
    for key, space in (("observation_space", observation_space), ("action_space", action_space)):
        if space is not None and not isinstance(space, gym.Space):
            raise DatasetError(f"{key}: expected a gymnasium.Space, got {type(space).__name__}.")


def check_options(
    dtype: torch.dtype, reward: Any, columns: Any, limit: Any, max_episode_steps: Any
) -> None:
    if columns is not None and not isinstance(columns, Mapping):
        raise DatasetError(
            "columns: expected a dict from our keys to the file's columns, such as "
            f"{{'reward': 'r'}}, got {columns!r}."
        )
    for key, value in (("limit", limit), ("max_episode_steps", max_episode_steps)):
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise DatasetError(
                f"{key}: expected a whole number, at least 1, or None, got {value!r}"
            )
    if dtype not in (torch.float32, torch.float64):
        raise DatasetError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    names = ("raw", "return_range", "minus_one")
    if not (reward in names if isinstance(reward, str) else _pair(reward)):
        raise DatasetError(f"reward: expected one of {names} or (scale, shift), got {reward!r}")


def known_scores(scores: tuple[float, float] | str | None) -> tuple[float, float] | None:
    if scores is None:
        return None
    if isinstance(scores, str):
        if scores not in REFERENCE_RETURNS:
            raise DatasetError(
                f"reference_scores: {scores!r} is not among {', '.join(REFERENCE_RETURNS)}."
            )
        return REFERENCE_RETURNS[scores]
    if not _pair(scores) or not scores[0] < scores[1]:
        raise DatasetError(
            "reference_scores: expected two returns (random, expert), the second greater, or a "
            f"task's name, got {scores!r}."
        )
    return float(scores[0]), float(scores[1])


def _pair(values: Any) -> bool:
    """Two finite numbers."""
    try:
        first, second = values
        return math.isfinite(first) and math.isfinite(second)
    except (TypeError, ValueError):
        return False
