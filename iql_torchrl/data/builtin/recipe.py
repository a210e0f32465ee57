"""How the log of a built-in dataset is made by acting in an environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

__all__ = ["Act", "Recipe", "import_for_recipe", "play", "record"]

Act: TypeAlias = Callable[[Any, Mapping[str, Any]], Any]
"""``act(observation, info) -> action`` of one episode."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one built-in dataset is made.

    Attributes:
        description: what the log contains and how it was made; stored with the dataset.
        algorithm: how the actions were chosen, in a few words.
        episodes: how many episodes the standard dataset has.
        environment, options: the id, and further arguments of the environment.
        disable_env_checker: of the environment's spec.
        package: which registers the environment.
        requirements: pip requirements to rebuild the environment.
        reference_scores: mean returns ``(random, expert)`` of the environment.
        controller: ``controller(env)(generator, number)`` gives the ``Act`` of an episode.
        infos: ``infos(env, observations, actions)`` gives further columns of an episode.
    """

    description: str
    algorithm: str
    episodes: int
    environment: str
    options: Mapping[str, Any] = field(default_factory=dict)
    disable_env_checker: bool = True
    package: str
    requirements: tuple[str, ...]
    reference_scores: tuple[float, float]
    controller: Callable[[Any], Callable[[np.random.Generator, int], Act]]
    infos: Callable[[Any, Any, Any], dict[str, Any] | None] = lambda *_: None


def record(
    name: str, recipe: Recipe, episodes: int, seed: int, progress: bool
) -> tuple[list[EpisodeBuffer], EnvSpec]:
    """The log, and the environment that was logged; the same arguments give the same log."""
    import_for_recipe(recipe.package, name)
    buffers = []
    registered = gymnasium.spec(recipe.environment)
    options = {**registered.kwargs, **recipe.options}
    spec = replace(registered, kwargs=options, disable_env_checker=recipe.disable_env_checker)
    with gymnasium.make(spec) as env:
        controller = recipe.controller(env)
        for number in tqdm(range(episodes), desc=name, unit="episode", disable=not progress):
            generator = np.random.default_rng([seed, number])
            reset_seed = int(generator.integers(2**31))
            lists = play(env, controller(generator, number), *env.reset(seed=reset_seed))
            del lists["infos"]
            columns = {key: _stacked(values) for key, values in lists.items()}
            infos = recipe.infos(env, columns["observations"], columns["actions"])
            buffers.append(EpisodeBuffer(seed=reset_seed, **columns, infos=infos))
    return buffers, spec


def play(env: Any, act: Act, observation: Any, info: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns of the episode that ``env.reset`` began: T + 1 observations, T of all others."""
    columns: dict[str, list[Any]] = {"observations": [observation]}
    over = False
    while not over:
        action = act(observation, info)
        observation, reward, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        step = {
            "observations": observation, "actions": action, "rewards": float(reward),
            "terminations": bool(terminated), "truncations": bool(truncated), "infos": info,
        }  # fmt: skip
        for key, value in step.items():
            columns.setdefault(key, []).append(value)
    return columns


def _stacked(values: list[Any]) -> Any:
    if not isinstance(values[0], Mapping):
        return np.stack(values)
    return {key: np.stack([each[key] for each in values]) for key in values[0]}


def import_for_recipe(module: str, dataset: str, *, extra: str = "datasets") -> None:
    """Import an optional package of ``extra`` that registers a recipe's environments.

    Raises ``ImportError`` naming what to install where it is missing.
    """
    try:
        import_module(module)
    except ImportError as error:
        raise ImportError(
            f"making {dataset!r} needs the package {module!r} ({error}): "
            f'pip install "iql_torchrl[{extra}]"'
        ) from error
