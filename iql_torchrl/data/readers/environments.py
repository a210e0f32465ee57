"""Fresh environments from ids, specs and what a dataset records."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

# Packages that register environments when they are imported, for a file that names one of theirs.
PACKAGES = ("ale_py", "gymnasium_robotics", "icu_sepsis", "minigrid", "ogbench")
WRAPPERS = ("iql_torchrl.data.readers.ogbench:FixedSpaces",)
INSTALL = (
    "install the package that registers it and import it first (AntMaze, Adroit and Kitchen: "
    'pip install "gymnasium-robotics"), or pass env=.'
)

EnvLike: TypeAlias = "str | EnvSpec | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]]"


def env_maker(env: EnvLike) -> Callable[[], gym.Env[Any, Any]]:
    """Return a function that makes a fresh environment from an id, a spec, an instance or a function.

    The function raises ``DatasetError`` saying what to install where the environment is missing.
    """
    if isinstance(env, gym.Env):
        if env.spec is None:
            raise DatasetError(
                f"env: {type(env).__name__} has no spec to make a fresh one from; pass a function."
            )
        env = env.spec
    if isinstance(env, str | EnvSpec):
        return partial(_make, env)
    if not callable(env):
        raise DatasetError(
            f"env: expected an id, an EnvSpec, an environment or a function, got {type(env).__name__}"
        )
    return env


def _make(spec: str | EnvSpec) -> gym.Env[Any, Any]:
    try:
        return gym.make(spec)
    except (gym.error.Error, ImportError, AttributeError) as error:
        name = spec if isinstance(spec, str) else spec.id
        # Gymnasium's own message names the package that a registered environment lacks.
        advice = "" if isinstance(error, gym.error.DependencyNotInstalled) else f"; {INSTALL}"
        raise DatasetError(
            f"environment {name!r} cannot be made ({one_line(error)}){advice}"
        ) from error


def recorded_env(stored: EnvSpec) -> gym.Env[Any, Any]:
    """Make a fresh environment of a spec that came with a dataset.

    Such a file may come from anywhere, so the code that it names is not run: the entry point that is
    registered here under the spec's id is called, with the stored arguments and step limit. Only
    wrappers of this package and of Gymnasium are applied, without those that write files. The packages
    in ``PACKAGES`` are imported where the id is theirs; other packages the user imports.

    Raises ``DatasetError`` for anything else, with what to do.
    """
    subject = f"environment {stored.id!r}, as the data name it,"
    if ":" in stored.id:
        raise DatasetError(
            f"{subject} begins with a module to import; code that a file names is not run: import it "
            "yourself and pass env=."
        )
    package = str(stored.entry_point).partition(".")[0].partition(":")[0]
    if stored.id not in gym.registry and package in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    if stored.id not in gym.registry:
        raise DatasetError(f"{subject} is not registered; {INSTALL}")
    for wrapper in stored.additional_wrappers:
        if not _is_known_wrapper(wrapper.entry_point):
            raise DatasetError(
                f"{subject} has the wrapper {wrapper.entry_point!r}; only Gymnasium's wrappers that "
                "write no files are made from a file: pass env= with a function that wraps the "
                "environment."
            )
    spec = replace(
        gym.registry[stored.id],
        kwargs=stored.kwargs,
        max_episode_steps=stored.max_episode_steps,
        disable_env_checker=stored.disable_env_checker,
        additional_wrappers=stored.additional_wrappers,
    )
    return _make(spec)


def _is_known_wrapper(entry_point: str) -> bool:
    module, _, name = entry_point.partition(":")
    with contextlib.suppress(ImportError, AttributeError):  # it lacks a package, or is a module
        if name in gym.wrappers.__all__ and name != "RecordVideo":
            return bool(getattr(gym.wrappers, name).__module__ == module)
    return entry_point in WRAPPERS
