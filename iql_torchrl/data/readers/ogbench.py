"""OGBench's datasets for one task: local npz files, rewards by OGBench's own relabelling.

Park, Frans, Eysenbach, Levine 2025, "OGBench: Benchmarking Offline Goal-Conditioned RL"; package
``ogbench``. The rows of a file belong to no task; ``ogbench.relabel_utils`` computes rewards and
masks from the recorded states of the simulation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from iql_torchrl.data.readers.arrays import Column, Opened, open_npz
from iql_torchrl.data.readers.episodes import table_source
from iql_torchrl.data.readers.ogbench_names import (
    FOLDER_VARIABLE,
    PREFIX,
    OGBenchName,
    parse_name,
)
from iql_torchrl.data.readers.source import ReadOptions, Source
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["FixedSpaces", "is_ogbench", "ogbench_files", "ogbench_source"]

#: The columns of a raw file that make transitions, and those that the relabelling reads.
ROWS = ("observations", "actions", "terminals")
STATES = ("qpos", "button_states")


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
    """Whether ``source`` is an id such as ``ogbench/cube-single-play-singletask-task2-v0``."""
    return isinstance(source, str) and source.startswith(PREFIX)


def ogbench_files(source: str) -> tuple[Path, ...]:
    """The file that :func:`ogbench_source` reads; raises as it does."""
    return (_existing(source, parse_name(source)),)


def ogbench_source(source: str, options: ReadOptions) -> Source:
    """The transitions of ``ogbench/ENVIRONMENT-KIND-singletask-taskN-v0``.

    Row t has the reward and the mask of its state ``s_t``, as OGBench computes them: in manipulation
    the number of parts of the task that are done minus their total, in mazes 0 at the goal and -1
    elsewhere. Where the task is done the mask is 0: the value is not bootstrapped, and the
    trajectory continues. A row where ``terminals`` is 1 is no transition; it only has the last
    observation of its trajectory.

    Raises ``DatasetError``: the id names no task, the environment or the package ``ogbench`` is
    missing, the file is missing or damaged, or it lacks a column; with what to do.
    """
    name = parse_name(source)
    spec = _spec(source, name)
    path = _existing(source, name)
    columns = open_npz(path)
    for column in ROWS:
        if column not in columns:
            raise DatasetError(
                f"{path}: has no {column!r} among {', '.join(sorted(columns))}; expected OGBench's "
                "raw columns. Download or make the file again."
            )
    env = gym.make(spec)
    try:
        rewards = _relabelled(path, name, env, columns)
        described = replace(
            options,
            observation_space=options.observation_space or env.observation_space,
            action_space=options.action_space or env.action_space,
        )
    finally:
        env.close()
    rows = {column: columns[column] for column in ROWS}
    valid = {"valids": 1 - np.asarray(columns["terminals"][:], np.float32)}
    opened = Opened(source, {**rows, **rewards, **valid})
    return replace(table_source(opened, described), env_spec=spec)


def _spec(source: str, name: OGBenchName) -> EnvSpec:
    try:
        import ogbench  # noqa: F401 (registers the environments)
    except ImportError as error:
        raise DatasetError(
            f"{source}: needs the package ogbench ({one_line(error)}): "
            'pip install "iql_torchrl[ogbench]"'
        ) from error
    try:
        spec = gym.spec(name.environment)
    except gym.error.Error as error:
        raise DatasetError(
            f"{source}: OGBench has no environment {name.environment!r} ({one_line(error)}); "
            f"expected a name such as '{PREFIX}cube-single-play-singletask-task2-v0'."
        ) from error
    wrapper = WrapperSpec(FixedSpaces.__name__, f"{__name__}:{FixedSpaces.__name__}", {})
    # Gymnasium's checker warns that the spaces at each access are other objects.
    return replace(spec, disable_env_checker=True, additional_wrappers=(wrapper,))


def _existing(source: str, name: OGBenchName) -> Path:
    path = name.path
    if path.is_file():
        return path
    if name.data.endswith("-local"):
        remedy = f"Make it: python -m iql_torchrl.data make {PREFIX}{name.data}"
    else:
        local = name.data.rpartition("-")[0] + "-local"
        download = f'import ogbench; ogbench.download_datasets(["{name.data}"], "{path.parent}")'
        remedy = (
            f"Download it with OGBench: python -c '{download}'. Or make rows of the same kind on "
            f"this machine: python -m iql_torchrl.data make {PREFIX}{local} (python -m "
            "iql_torchrl.data list has the names), and load them with -local in place of the version"
        )
    raise DatasetError(
        f"{source}: there is no file {path}. {remedy}. The environment variable {FOLDER_VARIABLE} "
        "names another folder. Nothing was downloaded."
    )


def _relabelled(
    path: Path, name: OGBenchName, env: gym.Env[Any, Any], columns: dict[str, Column]
) -> dict[str, Column]:
    """``rewards`` and ``masks`` of every row, ``(rows,)``, float32."""
    from ogbench.relabel_utils import relabel_dataset

    relabel: Callable[..., None] = relabel_dataset
    rows: dict[str, Any] = {column: columns[column] for column in STATES if column in columns}
    try:
        relabel(name.environment, env, rows)
    except KeyError as error:
        raise DatasetError(
            f"{path}: has no {error.args[0]!r} among {', '.join(sorted(columns))}, which the rewards "
            f"of {name.environment!r} are computed from; download or make the file again."
        ) from error
    except (ValueError, IndexError) as error:
        raise DatasetError(
            f"{path}: the rewards of {name.environment!r} cannot be computed ({one_line(error)}); "
            "check that the file belongs to this environment."
        ) from error
    return {column: rows[column] for column in ("rewards", "masks")}
