"""The options of ``load_dataset``, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from iql_torchrl.data.readers.environments import EnvLike, env_maker
from iql_torchrl.data.scaling import reward_map
from iql_torchrl.data.schema import DatasetError

#: Keys that ``columns`` may map to a list of columns of one number each.
JOINED = ("observation", "next_observation", "action")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a source is read and built: the options of ``load_dataset``, which describes each.

    What begins with ``env_`` is the environment's: see :meth:`described`. ``named``: ``columns``, with
    one name for each list of names: the names with commas.

    Raises ``DatasetError`` naming an option of another kind or out of its range.
    """

    env: EnvLike | None = None
    reward: str | tuple[float, float] = "raw"
    columns: Mapping[str, str | Sequence[str] | None] = field(default_factory=dict)
    reward_offset: int = 0
    concatenate: Sequence[str] | None = None
    limit: int | None = None
    dtype: torch.dtype = torch.float32
    clip_actions: bool = False
    max_episode_steps: int | None = None
    observation_space: gym.Space[Any] | None = None
    action_space: gym.Space[Any] | None = None
    autoreset: bool | None = None
    download: bool = True
    progress: bool | None = None
    env_observation_space: gym.Space[Any] | None = None
    env_action_space: gym.Space[Any] | None = None
    env_max_episode_steps: int | None = None
    named: dict[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        if self.columns is None:
            object.__setattr__(self, "columns", {})
        if not isinstance(self.columns, Mapping):
            raise DatasetError(
                "columns: expected a dict from our keys to the file's columns, such as "
                f"{{'reward': 'r'}}, got {self.columns!r}."
            )
        for key, name in self.columns.items():
            several = isinstance(name, list | tuple) and name and all(type(n) is str for n in name)
            if not (isinstance(name, str | None) or (several and key in JOINED)):
                raise DatasetError(
                    f"columns maps {key} to {name!r}; expected the name of one column, or None"
                    f"{', or a list of names' if key in JOINED else ''}. Name several columns "
                    f"{key}.0, {key}.1, ... in the file, or pass a dict of arrays."
                )
        for key in ("limit", "max_episode_steps"):
            number = getattr(self, key)
            if number is not None and (not isinstance(number, Integral) or number < 1):
                raise DatasetError(
                    f"{key}: expected an integer, at least 1, or None, got {number!r}"
                )
        for key in ("observation_space", "action_space"):
            if not isinstance(space := getattr(self, key), gym.Space | None):
                raise DatasetError(
                    f"{key}: expected a gymnasium.Space, got {type(space).__name__}."
                )
        if self.autoreset not in (None, True, False):
            raise DatasetError(f"autoreset: expected True, False or None, got {self.autoreset!r}")
        if self.reward_offset not in (0, 1):
            raise DatasetError(f"reward_offset: expected 0 or 1, got {self.reward_offset!r}")
        if self.dtype not in (torch.float32, torch.float64):
            raise DatasetError(f"dtype: expected torch.float32 or torch.float64, got {self.dtype}")
        reward_map(self.reward, np.arange(2.0))
        if self.env is not None:
            env_maker(self.env)
        names = {
            k: n if isinstance(n, str | None) else ", ".join(n) for k, n in self.columns.items()
        }
        object.__setattr__(self, "named", names)

    def described(self) -> ReadOptions:
        """With the environment's spaces, which are used where a source has none, and its step limit."""
        if self.env is None:
            return self
        env = env_maker(self.env)()
        env.close()
        steps = env.spec.max_episode_steps if env.spec is not None else None
        return replace(
            self,
            env_observation_space=env.observation_space,
            env_action_space=env.action_space,
            env_max_episode_steps=steps,
            max_episode_steps=self.max_episode_steps or steps,
        )
