"""Functions that make fresh environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["EnvLike", "env_maker"]


EnvLike: TypeAlias = "str | EnvSpec | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]]"


def env_maker(env: EnvLike) -> Callable[[], gym.Env[Any, Any]]:
    """A function that makes a fresh environment from an id, a spec, an instance or a function.

    The function raises ``DatasetError`` saying what to install where the environment is missing.
    """
    if isinstance(env, gym.Env):
        if env.spec is None:
            raise DatasetError(
                f"env: {type(env).__name__} has no spec to make a fresh one from; pass a function."
            )
        env = env.spec
    if isinstance(env, str | EnvSpec):
        return _SpecMaker(env)
    if not callable(env):
        raise DatasetError(
            f"env: expected an id, an EnvSpec, an environment or a function, got {type(env).__name__}"
        )
    return env


@dataclass(frozen=True)
class _SpecMaker:
    spec: str | EnvSpec

    def __call__(self) -> gym.Env[Any, Any]:
        try:
            return gym.make(self.spec)
        except (gym.error.Error, ImportError, AttributeError) as error:
            name = self.spec if isinstance(self.spec, str) else self.spec.id
            raise DatasetError(
                f"environment {name!r} cannot be made ({one_line(error)}); {_advice(name)}"
            ) from error


def _advice(name: str) -> str:
    """What to install, from the environment's own registration where it has one."""
    spec = gym.registry.get(name)
    entry = str(spec.entry_point) if spec is not None else ""
    for folder, extra in (
        ("mujoco", "mujoco"),
        ("box2d", "box2d"),
        ("toy_text", "toy-text"),
        ("classic_control", "classic-control"),
    ):
        if f"envs.{folder}" in entry:
            return f'install it with: pip install "gymnasium[{extra}]"'
    return (
        "install the package that registers it and import it first (AntMaze, Adroit and Kitchen: "
        'pip install "gymnasium-robotics"), or pass env=.'
    )
