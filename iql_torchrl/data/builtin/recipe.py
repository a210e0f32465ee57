"""The parts of a built-in dataset before it is written to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from numpy.typing import NDArray
from tqdm import tqdm

__all__ = [
    "EpisodeRecord",
    "Recipe",
    "Recording",
    "import_for_recipe",
    "mean_return",
    "progress_bar",
]

REFERENCE_EPISODES = 100
REFERENCE_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A log, and what its Minari metadata needs.

    Attributes:
        episodes: buffers with ``T + 1`` observations and ``T`` of everything else.
        env_spec: the environment that was logged; loading the dataset can rebuild it.
        reference_scores: mean returns ``(random, expert)``, or None where none were measured.
        algorithm: how the actions were chosen, in a few words.
        requirements: pip requirements to rebuild the environment.
    """

    episodes: Sequence[EpisodeBuffer]
    env_spec: EnvSpec
    reference_scores: tuple[float, float] | None
    algorithm: str
    requirements: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one built-in dataset is made.

    Attributes:
        description: what the log contains and how it was made; stored with the dataset.
        episodes: how many episodes the standard dataset has.
        record: ``record(episodes, seed, progress) -> Recording``; the same arguments give the
            same recording.
    """

    description: str
    episodes: int
    record: Callable[[int, int, bool], Recording]


class EpisodeRecord:
    """Collects one episode step by step; ``infos`` get one entry per action."""

    def __init__(self, seed: int, observation: Any) -> None:
        self.seed = seed
        self.observations: list[Any] = [observation]
        self.actions: list[Any] = []
        self.rewards: list[float] = []
        self.terminations: list[bool] = []
        self.truncations: list[bool] = []
        self.infos: dict[str, list[Any]] = {}

    def add(
        self,
        action: Any,
        observation: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record one step; True when it was the last one."""
        self.actions.append(action)
        self.observations.append(observation)
        self.rewards.append(float(reward))
        self.terminations.append(bool(terminated))
        self.truncations.append(bool(truncated))
        for key, value in (info or {}).items():
            self.infos.setdefault(key, []).append(value)
        return bool(terminated or truncated)

    def buffer(self) -> EpisodeBuffer:
        """The episode as Minari stores it."""
        first = self.observations[0]
        observations: Any
        if isinstance(first, Mapping):
            observations = {
                key: np.stack([observation[key] for observation in self.observations])
                for key in first
            }
        else:
            observations = np.stack(self.observations)
        return EpisodeBuffer(
            seed=self.seed,
            observations=observations,
            actions=np.stack(self.actions),
            rewards=np.asarray(self.rewards, dtype=np.float64),
            terminations=np.asarray(self.terminations),
            truncations=np.asarray(self.truncations),
            infos={key: np.stack(values) for key, values in self.infos.items()} or None,
        )


def mean_return(
    env: Any, controller: Callable[[np.random.Generator], Callable[[Any], NDArray[Any]]]
) -> float:
    """Mean return over 100 episodes of ``controller(generator)``, a new one for each episode.

    Episode ``e`` starts with ``env.reset(seed=1_000_000 + e)``, and its action noise has the same
    seed. Reference scores describe the task, so they do not depend on the seed of the dataset.
    """
    returns = []
    for episode in range(REFERENCE_EPISODES):
        act = controller(np.random.default_rng(REFERENCE_SEED + episode))
        observation, _ = env.reset(seed=REFERENCE_SEED + episode)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total += float(reward)
            over = bool(terminated or truncated)
        returns.append(total)
    return float(np.mean(returns))


def import_for_recipe(module: str, dataset: str, *, extra: str = "datasets") -> ModuleType:
    """Import an optional package of ``extra`` that registers a recipe's environments.

    Raises:
        ImportError: it is missing; the message names what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"making {dataset!r} needs the package {module!r} ({error}): "
            f'pip install "iql_torchrl[{extra}]"'
        ) from error


def progress_bar(count: int, what: str, progress: bool) -> Iterable[int]:
    """``range(count)``, with a bar on standard error if ``progress``."""
    bar: Iterable[int] = tqdm(range(count), desc=what, unit="episode", disable=not progress)
    return bar
