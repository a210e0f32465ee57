"""Functions that make fresh environments, with the observations and actions of a dataset."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs

from iql_torchrl.data.codec import (
    CATEGORIES,
    Adaptation,
    flat_action_space,
    join,
    leaf_of,
    leaf_spaces,
    unflat_action,
)
from iql_torchrl.data.schema import DatasetError, nested
from iql_torchrl.descriptions import one_line

# Packages that register environments when they are imported, for a file that names one of theirs.
PACKAGES = ("ale_py", "gymnasium_robotics", "icu_sepsis", "minigrid", "ogbench")
WRAPPERS = (
    "iql_torchrl.data.readers.environments:AdaptedEnv",
    "iql_torchrl.data.readers.ogbench:FixedSpaces",
)
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
        # gym, which some of them import, prints a notice
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
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


def adapted_env(
    maker: Callable[[], gym.Env[Any, Any]], adaptation: Adaptation
) -> gym.Env[Any, Any]:
    """The environment of ``maker`` with the observations and actions of the dataset.

    What is adapted already stays: an observation without leaves, a flat action.
    """
    return AdaptedEnv(maker(), **vars(adaptation))


class AdaptedEnv(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """``env`` with the :class:`Adaptation` of these fields."""

    def __init__(self, env: gym.Env[Any, Any], **adaptation: Any) -> None:
        RecordConstructorArgs.__init__(self, **adaptation)
        gym.Wrapper.__init__(self, env)
        change, space, actions = Adaptation(**adaptation), env.observation_space, env.action_space
        owner = type(env.unwrapped).__name__ if env.spec is None else env.spec.id
        leaves, mask = leaf_spaces(space, ()), tuple(change.mask.split("/"))
        if () in leaves:
            change = Adaptation(flat_action=change.flat_action)
        self._mask = mask if mask in leaves else None
        self._paths = change.sources(space, owner)
        self._joined = [tuple(name.split("/")) for name in change.concatenate]
        self.observation_space = change.observation_space(space, owner)
        self._flat = change.flat_action and not isinstance(actions, CATEGORIES)
        if self._flat:
            self.action_space = flat_action_space(actions, owner)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        return self._adapted(*self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        taken = unflat_action(action, self.env.action_space) if self._flat else action
        observation, reward, terminated, truncated, info = self.env.step(taken)
        observation, info = self._adapted(observation, info)
        return observation, reward, terminated, truncated, info

    def _adapted(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._mask is not None:
            info = {**info, "action_mask": leaf_of(observation, self._mask)}
        leaves = {key: leaf_of(observation, path) for key, path in self._paths.items()}
        if not self._joined:
            return nested(leaves), info
        values = join([leaves[key] for key in self._joined])
        return values.astype(self.observation_space.dtype, copy=False), info
