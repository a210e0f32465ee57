"""Functions that make fresh environments."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["EnvLike", "env_maker", "recorded_env_maker"]

# Packages that register environments when they are imported, for a file that names one of theirs.
PACKAGES = ("ale_py", "gymnasium_robotics", "icu_sepsis", "minigrid", "ogbench")
OWN_WRAPPERS = ("iql_torchrl.data.readers.ogbench:FixedSpaces",)


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


def recorded_env_maker(spec: EnvSpec) -> Callable[[], gym.Env[Any, Any]]:
    """A function that makes the environment whose ``spec`` came with a table or Minari's metadata.

    Such a file may come from anywhere, so it names no code: what is called is the entry point that is
    registered here under the spec's id, with the stored arguments and step limit. Of wrappers only
    Gymnasium's, without those that write files, and ours. The packages in ``PACKAGES`` are imported
    where the id is theirs; other packages the user imports.

    The function raises ``DatasetError`` for anything else, with what to do.
    """
    return _RecordedMaker(spec)


@dataclass(frozen=True)
class _RecordedMaker:
    spec: EnvSpec

    def __call__(self) -> gym.Env[Any, Any]:
        return _SpecMaker(_registered(self.spec))()


def _registered(stored: EnvSpec) -> EnvSpec:
    """The spec registered under the stored one's id, with the stored arguments, limit and wrappers."""
    name = stored.id
    if ":" in name:
        raise DatasetError(
            f"environment {name!r}, as the data name it, begins with a module to import; code that a "
            "file names is not run: import it yourself and pass env=."
        )
    package = str(stored.entry_point).partition(".")[0].partition(":")[0]
    if name not in gym.registry and package in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    if name not in gym.registry:
        raise DatasetError(
            f"environment {name!r}, as the data name it, is not registered; {_advice(name)}"
        )
    for wrapper in stored.additional_wrappers:
        if not _is_known_wrapper(wrapper.entry_point):
            raise DatasetError(
                f"environment {name!r}, as the data name it, has the wrapper {wrapper.entry_point!r}; "
                "only Gymnasium's wrappers that write no files are made from a file: pass env= with a "
                "function that wraps the environment."
            )
    return replace(
        gym.registry[name],
        kwargs=stored.kwargs,
        max_episode_steps=stored.max_episode_steps,
        disable_env_checker=stored.disable_env_checker,
        additional_wrappers=stored.additional_wrappers,
    )


def _is_known_wrapper(entry_point: str) -> bool:
    module, _, name = entry_point.partition(":")
    if entry_point in OWN_WRAPPERS:
        return True
    wrapper: Any = None
    if module.startswith("gymnasium.wrappers.") and name in gym.wrappers.__all__:
        with contextlib.suppress(ImportError):  # of a package that this wrapper needs
            wrapper = getattr(gym.wrappers, name, None)
    return (
        isinstance(wrapper, type)
        and issubclass(wrapper, gym.Wrapper)
        and wrapper.__module__ == module
        and name != "RecordVideo"
    )


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
