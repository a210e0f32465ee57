"""OGBench's data made on this machine with the package's own scripted controllers.

The rows follow the protocol of the published data but are another random draw, from other versions
of the simulator, so that their names end in ``-local``. The files have OGBench's columns and are in
its folder: see ``readers.ogbench``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium
import numpy as np

from iql_torchrl.data.builtin.ogbench_episodes import Arrays, maze_episode, plan_episode
from iql_torchrl.data.builtin.recipe import import_for_recipe, progress_bar
from iql_torchrl.data.locks import folder_lock
from iql_torchrl.data.readers.arrays import open_npz
from iql_torchrl.data.readers.ogbench import PREFIX, ogbench_folder
from iql_torchrl.files import whole_file

__all__ = ["OGBENCH_LOCAL", "OGBenchRecipe", "make_ogbench", "ogbench_id", "ogbench_path"]

ROWS = 1001  # of an episode; the last one only has the observation after 1,000 steps
PACKAGES = ("ogbench", "mujoco", "numpy")


@dataclass(frozen=True, kw_only=True)
class OGBenchRecipe:
    """How one dataset of OGBench is made again.

    Attributes:
        environment: the id of the environment in which the controllers act.
        description: what the rows contain.
        episode: ``episode(env, seed, number)`` gives the columns of one episode.
        options: further arguments of the environment.
        episodes: how many the published data for training has.
    """

    environment: str
    description: str
    episode: Callable[[Any, int, int], Arrays]
    options: Mapping[str, Any] = field(default_factory=dict)
    episodes: int = 1000


def _arm(environment: str, objects: str) -> OGBenchRecipe:
    return OGBenchRecipe(
        environment=environment,
        description=(
            f"{environment}: a robot arm moves {objects} to random targets, one after the other, by "
            "OGBench's plan-following controllers with smooth noise (kind 'play'); 1,000 steps an "
            "episode. A new draw by the published protocol, not the published rows. Rewards belong "
            "to a task: load it with -singletask-taskN-local in place of -local."
        ),
        episode=plan_episode,
        options=MappingProxyType({"mode": "data_collection"}),
    )


def _maze(size: str) -> OGBenchRecipe:
    environment = f"pointmaze-{size}-v0"
    return OGBenchRecipe(
        environment=environment,
        description=(
            f"{environment}: a point follows shortest paths to random goals, one after the other, "
            "with Gaussian noise of deviation 0.5 (kind 'navigate'); 1,000 steps an episode. A new "
            "draw by the published protocol, not the published rows. Rewards belong to a task: load "
            "it with -singletask-taskN-local in place of -local."
        ),
        episode=maze_episode,
    )


OGBENCH_LOCAL: Mapping[str, OGBenchRecipe] = MappingProxyType(
    {
        f"{PREFIX}cube-single-play-local": _arm("cube-single-v0", "a cube"),
        f"{PREFIX}scene-play-local": _arm("scene-v0", "a cube, two buttons, a drawer and a window"),
        f"{PREFIX}puzzle-3x3-play-local": _arm("puzzle-3x3-v0", "the 9 buttons of a puzzle"),
        f"{PREFIX}puzzle-4x4-play-local": _arm("puzzle-4x4-v0", "the 16 buttons of a puzzle"),
        f"{PREFIX}pointmaze-medium-navigate-local": _maze("medium"),
        f"{PREFIX}pointmaze-large-navigate-local": _maze("large"),
    }
)
"""Name to recipe; the name with ``-singletask-taskN`` before ``-local`` is what is loaded."""


def ogbench_path(name: str) -> Path:
    """The file of the rows ``name``, a key of ``OGBENCH_LOCAL``."""
    return ogbench_folder() / f"{name.removeprefix(PREFIX)}.npz"


def ogbench_id(name: str) -> str:
    """The id with OGBench's default task, for ``load_dataset``."""
    return f"{name.removesuffix('-local')}-singletask-local"


def make_ogbench(name: str, *, episodes: int, seed: int, progress: bool) -> None:
    """Make the rows ``name`` (a key of ``OGBENCH_LOCAL``) and write their file.

    Each episode is written to a folder next to the file, completely or not at all. An interrupted
    call that is repeated continues there; the result is the same. The folder is removed at the end.

    Raises ``ValueError`` where the file exists, or where the folder is of other versions of the
    packages or of the simulator; ``ImportError`` without the package ``ogbench``.
    """
    recipe, path = OGBENCH_LOCAL[name], ogbench_path(name)
    import_for_recipe("ogbench", name, extra="ogbench")
    parts = path.with_name(f".making-{path.stem}-seed{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(parts):
        if path.exists():
            raise ValueError(f"{path} was made by another process meanwhile")
        parts.mkdir(exist_ok=True)
        _check_versions(parts)
        files = [parts / f"episode-{number:05d}.npz" for number in range(episodes)]
        _make_missing(recipe, name, files, seed, progress)
        made = {"name": name, "seed": seed, "episodes": episodes, **_versions()}
        _write(path, {**_joined(files), "made_with": np.array(json.dumps(made))})
        shutil.rmtree(parts)


def _make_missing(
    recipe: OGBenchRecipe, name: str, files: list[Path], seed: int, progress: bool
) -> None:
    env: Any = None
    try:
        for number in progress_bar(len(files), name, progress):
            if files[number].exists():
                continue
            if env is None:
                env = gymnasium.make(
                    recipe.environment, terminate_at_goal=False, max_episode_steps=ROWS,
                    disable_env_checker=True, **recipe.options,
                )  # fmt: skip
            _write(files[number], recipe.episode(env, seed, number))
    finally:
        if env is not None:
            env.close()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def _check_versions(parts: Path) -> None:
    path, current = parts / "made_with.json", _versions()
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(current))
    if (before := json.loads(path.read_text())) != current:
        raise ValueError(
            f"{parts} has episodes that were made with {before}; {current} are installed now, and "
            "may give other rows. Install those versions, or remove the folder to begin again."
        )


def _joined(files: list[Path]) -> Arrays:
    """All episodes as one table."""
    columns = [open_npz(file) for file in files]
    return {key: np.concatenate([each[key][:] for each in columns]) for key in columns[0]}


def _write(path: Path, arrays: Arrays) -> None:
    # np.savez adds a suffix to a file name, but not to an open file.
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
