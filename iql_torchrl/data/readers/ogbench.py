"""OGBench's datasets for one task: local npz files, rewards by OGBench's own relabelling.

Park, Frans, Eysenbach, Levine 2025, "OGBench: Benchmarking Offline Goal-Conditioned RL"; package
``ogbench``. The rows of a file belong to no task; ``ogbench.relabel_utils`` computes rewards and
masks from the recorded states of the simulation.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from iql_torchrl.data.readers.arrays import Columns, open_npz, package, reading
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError

PREFIX = "ogbench/"
FOLDER_VARIABLE = "OGBENCH_DATASETS_PATH"
MAKE = "python benchmarks/make_ogbench.py"
#: The columns of a raw file that make transitions, and those that the relabelling reads.
ROWS = ("observations", "actions", "terminals")
STATES = ("qpos", "button_states")
EXAMPLE = f"{PREFIX}cube-single-play-singletask-task2-v0"


class FixedSpaces(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """An environment whose spaces are made once.

    OGBench's arm makes them again at each access, with a warning about the precision of bounds.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        with _bounds_may_be_rounded():
            self.action_space = env.action_space
            self.observation_space = env.observation_space

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        with _bounds_may_be_rounded():  # some resets make random steps
            return self.env.reset(**options)


@contextmanager
def _bounds_may_be_rounded() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*precision lowered by casting")
        yield


def is_ogbench(source: Any) -> bool:
    """Return True for an id such as ``ogbench/cube-single-play-singletask-task2-v0``."""
    return isinstance(source, str) and source.startswith(PREFIX)


def ogbench_folder() -> Path:
    """The folder of the npz files: ``OGBENCH_DATASETS_PATH``, or OGBench's own default."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.ogbench/data").expanduser()


def open_ogbench(source: str, options: ReadOptions) -> Columns:
    """The columns of ``ogbench/ENVIRONMENT-KIND-singletask-taskN-v0``, with its environment.

    Row t has the reward and the mask of its state ``s_t``, as OGBench computes them. Where the task is
    done the mask is 0: the value is not bootstrapped, and the trajectory continues. A row where
    ``terminals`` is 1 is not a transition; it only has the last observation of its trajectory.

    Raises ``DatasetError``: the id names no task, the environment or the package ``ogbench`` is
    missing, the file is missing or damaged, or it lacks a column; with what to do.
    """
    environment, _ = parse_name(source)
    spec, path = _spec(source, environment), ogbench_file(source)
    columns = open_npz(path)
    relabel = package("ogbench.relabel_utils", source, "ogbench")
    states = {column: np.asarray(columns[column][:]) for column in STATES if column in columns}
    env = gym.make(spec)
    try:
        rows = {column: columns[column] for column in ROWS}
        problem = f"the rewards of {environment!r} cannot be computed"
        remedy = "check that the file belongs to this environment"
        with reading(path, problem, ValueError, IndexError, remedy=remedy):
            relabel.relabel_dataset(environment, env, states)
    except KeyError as error:
        raise DatasetError(
            f"{path}: has no {error.args[0]!r} among {', '.join(sorted(columns))}; expected OGBench's "
            f"raw columns, from which the rewards of {environment!r} are computed. Download or make "
            "the file again."
        ) from error
    finally:
        env.close()
    rows |= {"rewards": states["rewards"], "masks": states["masks"]}
    rows["valids"] = 1 - np.asarray(columns["terminals"][:], np.float32)
    return Columns(
        source, rows, env.action_space, observation_space=env.observation_space, env_spec=spec
    )


def _spec(source: str, environment: str) -> EnvSpec:
    package("ogbench", source, "ogbench")  # registers the environments
    problem, remedy = f"has no environment {environment!r}", f"expected a name such as {EXAMPLE!r}"
    with reading(source, f"OGBench {problem}", gym.error.Error, remedy=remedy):
        spec = gym.spec(environment)
    wrapper = WrapperSpec(FixedSpaces.__name__, f"{__name__}:{FixedSpaces.__name__}", {})
    # Gymnasium's checker warns that the spaces at each access are other objects.
    return replace(spec, disable_env_checker=True, additional_wrappers=(wrapper,))


def parse_name(source: str) -> tuple[str, str]:
    """The ids of the environment and of the rows, without ``ogbench/``.

    Such as ``cube-single-singletask-task2-v0`` and ``cube-single-play-v0``; ids of rows that were made
    on this machine end in ``-local``. Raises ``DatasetError`` for a name without a task, giving the
    names with one.
    """
    name = source.removeprefix(PREFIX)
    pattern = r"([\w-]+)-([a-z]+)-singletask(-task[1-9])?-(v\d+|local)"
    if (match := re.fullmatch(pattern, name)) is None:
        rows, _, draw = name.rpartition("-")
        first = f"{PREFIX}{rows}-singletask-task1-{draw}"
        known = rows and re.fullmatch(pattern, first.removeprefix(PREFIX))
        raise DatasetError(
            f"{source}: expected {PREFIX}ENVIRONMENT-KIND-singletask-taskN-v0, such as "
            f"load_dataset({first if known else EXAMPLE!r}), or another of task1 to task5, or -local "
            "in place of -v0 for rows made on this machine."
        )
    environment, kind, task, draw = match.groups()
    version = "v0" if draw == "local" else draw
    return f"{environment}-singletask{task or ''}-{version}", f"{environment}-{kind}-{draw}"


def ogbench_file(source: str) -> Path:
    """The existing file that :func:`open_ogbench` reads; raises as it does."""
    _, data = parse_name(source)
    path = ogbench_folder() / f"{data}.npz"
    if path.is_file():
        return path
    before, _, draw = data.rpartition("-")
    if draw == "local":
        remedy = f"Make it, in a clone of this package's repository: {MAKE} {data}"
    else:
        download = f'import ogbench; ogbench.download_datasets(["{data}"], "{path.parent}")'
        remedy = (
            f"Download it with OGBench: python -c '{download}'. Or make rows of the same kind, in a "
            f"clone of this package's repository: {MAKE} {before}-local, and load them with -local in "
            "place of the version"
        )
    raise DatasetError(
        f"{source}: there is no file {path}. {remedy}. The environment variable {FOLDER_VARIABLE} "
        "names another folder. Nothing was downloaded."
    )
