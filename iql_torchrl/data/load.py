"""``load_dataset``: from any source to an ``OfflineDataset``."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import minari
import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.build import build
from iql_torchrl.data.cache import describe, fingerprint, load_or_build
from iql_torchrl.data.dataset import OfflineDataset
from iql_torchrl.data.readers.arrays import flatten, hdf5_parts, open_hdf5, open_npz
from iql_torchrl.data.readers.minari import find_minari, minari_files, minari_source
from iql_torchrl.data.readers.source import (
    EnvLike,
    ReadOptions,
    Source,
    chain,
    concatenated,
    env_maker,
    joined_env_maker,
)
from iql_torchrl.data.readers.table import table_source
from iql_torchrl.data.readers.tensordict import columns_of_tensordict
from iql_torchrl.data.scaling import REFERENCE_RETURNS
from iql_torchrl.data.schema import DatasetError, DatasetWarning, Key

__all__ = ["load_dataset"]

TABLE_FILES = (".hdf5", ".h5", ".npz")

SourceLike: TypeAlias = (
    "str | Path | minari.MinariDataset | Mapping[str, Any] | TensorDictBase | ReplayBuffer"
    " | Storage | Sequence[Any]"
)


def load_dataset(
    source: SourceLike,
    *,
    env: EnvLike | None = None,
    reward: str | tuple[float, float] = "raw",
    columns: Mapping[str, str | None] | None = None,
    reward_offset: int = 0,
    concatenate: Sequence[str] | None = None,
    limit: int | None = None,
    memmap: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    clip_actions: bool = False,
    max_episode_steps: int | None = None,
    reference_scores: tuple[float, float] | str | None = None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
    download: bool = True,
    progress: bool | None = None,
) -> OfflineDataset:
    """Read offline data, check it once, and return an ``OfflineDataset``.

    Args:
        source: a Minari id (downloaded only when absent), a ``MinariDataset``, a path to
            ``.hdf5``/``.h5`` (D4RL's layout) or ``.npz``, a dict of arrays, a TensorDict, a
            TorchRL replay buffer or storage; or a list of these, joined if their spaces agree.
        env: id, spec, instance or function; its spaces describe a table's columns, and
            ``make_env`` makes it. Minari's own record is used where this is None.
        reward: ``"raw"``, ``"return_range"`` (1000 / (max - min episode return): the paper's
            locomotion), ``"minus_one"`` (AntMaze), or ``(scale, shift)``: r' = scale * r + shift.
        columns: our key to the file's column: ``observation``, ``action``, ``reward``,
            ``next_observation``, ``terminated``, ``not_terminated`` (its opposite: 0 where a row
            terminates), ``truncated``, ``episode``, ``valid`` (0 where a row is no transition and
            only has the observation after the row before), ``action_mask``,
            ``next_action_mask``, ``action_log_prob``; None leaves an optional one out, and
            ``terminated`` where no row terminates. Common names are recognised by themselves, OGBench's
            too: ``masks`` is ``not_terminated`` (also where ``columns`` maps
            ``terminated`` to it), and ``terminals`` beside ``masks`` or ``valids`` marks ends of
            trajectories, which may continue after a termination (see ``table_source``).
        reward_offset: 1 where a row's reward belongs to the action of the row before.
        concatenate: leaves of a Dict observation to join, in order, into one ``observation``; the
            environments of ``make_env`` give it joined too.
        limit: at most this many transitions: the first complete episodes; only a first episode
            longer than the limit is cut, and truncated there.
        memmap: a folder for a memory-mapped table, built in bounded memory and reused while the
            files and options stay the same. Every process may use the same folder: one builds, the
            others wait. The table's tensors are views of the files: what is written into
            them (``transitions["action"].mul_(2)``) changes the files, and the next call returns it;
            clone the transitions before changing them.
        dtype: of observations, continuous actions and rewards.
        clip_actions: clip continuous actions to their bounds; otherwise such actions are an error.
        max_episode_steps: cuts longer episodes of a table without truncation marks; by default
            the environment's own limit.
        reference_scores: (random, expert) raw returns, or a task of ``REFERENCE_RETURNS``.
        observation_space, action_space: for tables, instead of ``env``. Without either, float
            actions within [-1, 1] get those bounds, others the data's range with a warning.
        download: False never uses the network.
        progress: a progress bar; None shows it on terminals only.

    Warns with ``DatasetWarning``, and keeps the sentence in ``notes``, where marks contradict the
    rows: a termination after which the same trajectory goes on; terminations at one fixed length
    in every episode; truncation marks inside smooth motion; no mark at all in a table that jumps;
    ends of episodes that do not lie where the rows jump (``readers.motion`` and
    ``readers.table_jumps`` say what is measured); a ``next_observation`` that is not the following
    row's observation inside an episode, or is at truncated ends (``readers.table_successors``);
    terminations in nearly every row of a trajectory. Also where most rows are dropped, most
    episodes have one row, or actions look like encoded categories. A memory-mapped table that is
    reused gives its warnings again.

    Raises:
        DatasetError: naming the key, rows, episode, what was expected and what to do.
    """
    _check_options(dtype, reward, columns, limit, max_episode_steps)
    for key, space in (("observation_space", observation_space), ("action_space", action_space)):
        if space is not None and not isinstance(space, gym.Space):
            raise DatasetError(f"{key}: expected a gymnasium.Space, got {type(space).__name__}.")
    maker = None if env is None else env_maker(env)
    options = ReadOptions(
        columns=dict(columns or {}),
        reward_offset=reward_offset,
        limit=None if isinstance(source, list | tuple) else limit,
        max_episode_steps=max_episode_steps,
        dtype=dtype,
        download=download,
        observation_space=observation_space,
        action_space=action_space,
    )
    how: dict[str, Any] = {
        "reward": reward, "dtype": dtype, "clip_actions": clip_actions, "progress": progress,
    }  # fmt: skip

    def opened() -> Source:
        table = _open(source, options, maker)
        table = concatenated(table, concatenate) if concatenate else table
        return chain([table], limit)

    if memmap is None:
        read = opened()
        built, description = build(read, **how), describe(read)
    else:
        settings = {
            **how, "progress": None, "columns": options.columns, "reward_offset": reward_offset,
            "concatenate": concatenate, "limit": limit, "max_episode_steps": max_episode_steps,
            "observation": _space_identity(observation_space),
            "action": _space_identity(action_space), "env": _env_identity(env),
            "source": source if isinstance(source, str | Path | list | tuple) else None,
        }  # fmt: skip
        identity = fingerprint(_files(source, options), settings)
        built, description = load_or_build(opened, Path(memmap), identity, **how)
    for text in built.warnings:
        warnings.warn(text, DatasetWarning, stacklevel=2)
    if maker is None and description.env_spec is not None:
        maker = env_maker(description.env_spec)
    if maker is not None and concatenate:
        maker = joined_env_maker(maker, concatenate)
    return OfflineDataset(
        transitions=built.transitions,
        observation_space=description.observation_space,
        action_space=description.action_space,
        statistics={_public(key): value for key, value in built.statistics.items()},
        episode_returns=built.episode_returns,
        episode_lengths=built.episode_lengths,
        reward_map=built.map,
        reference_scores=_scores(reference_scores) or description.reference_scores,
        notes=built.notes,
        name=description.name,
        dtype=dtype,
        env=maker,
    )


def _files(source: Any, options: ReadOptions) -> tuple[Path, ...]:
    """Every file that the source reads; empty if any part of it is in memory."""
    if isinstance(source, list | tuple):
        parts = [_files(item, options) for item in source]
        return tuple(path for part in parts for path in part) if all(parts) else ()
    if isinstance(source, str | Path) and Path(source).suffix.lower() in TABLE_FILES:
        path = Path(source)
        if not path.is_file():
            return ()
        return (path,) if path.suffix.lower() == ".npz" else (path, *hdf5_parts(path))
    if isinstance(source, str):
        source = find_minari(source, download=options.download)
    return minari_files(source) if isinstance(source, minari.MinariDataset) else ()


def _env_identity(env: EnvLike | None) -> str | None:
    """What of an environment decides how a table is read."""
    if env is None:
        return None
    # An id alone does not say which limit and spaces are registered under it.
    made = env if isinstance(env, gym.Env) else env_maker(env)()
    spaces = f"{_space_identity(made.observation_space)} {_space_identity(made.action_space)}"
    identity = f"{made.spec} {spaces}"
    if made is not env:
        made.close()
    return identity


def _space_identity(space: gym.Space[Any] | None) -> str | None:
    """A space's text, with a digest of its bounds, which the text shortens."""
    if space is None:
        return None
    if isinstance(space, gym.spaces.Box):
        digest = hashlib.blake2b(space.low.tobytes() + space.high.tobytes(), digest_size=16)
        return f"{space} {digest.hexdigest()}"
    if isinstance(space, gym.spaces.Dict):
        return str({key: _space_identity(inner) for key, inner in space.spaces.items()})
    return str(space)


def _check_options(
    dtype: torch.dtype, reward: Any, columns: Any, limit: Any, max_episode_steps: Any
) -> None:
    if columns is not None and not isinstance(columns, Mapping):
        raise DatasetError(
            "columns: expected a dict from our keys to the file's columns, such as "
            f"{{'reward': 'r'}}, got {columns!r}."
        )
    for key, value in (("limit", limit), ("max_episode_steps", max_episode_steps)):
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise DatasetError(
                f"{key}: expected a whole number, at least 1, or None, got {value!r}"
            )
    if dtype not in (torch.float32, torch.float64):
        raise DatasetError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    names = ("raw", "return_range", "minus_one")
    if not (reward in names if isinstance(reward, str) else _pair(reward)):
        raise DatasetError(f"reward: expected one of {names} or (scale, shift), got {reward!r}")


def _public(key: Key) -> str | Key:
    return key[0] if len(key) == 1 else key


def _scores(given: tuple[float, float] | str | None) -> tuple[float, float] | None:
    if given is None:
        return None
    if isinstance(given, str):
        if given not in REFERENCE_RETURNS:
            raise DatasetError(
                f"reference_scores: {given!r} is not among {', '.join(REFERENCE_RETURNS)}."
            )
        return REFERENCE_RETURNS[given]
    if not _pair(given) or given[0] == given[1]:
        raise DatasetError(
            "reference_scores: expected two different returns (random, expert), or a task's name, "
            f"got {given!r}."
        )
    return float(given[0]), float(given[1])


def _pair(values: Any) -> bool:
    """Two finite numbers."""
    try:
        first, second = values
        return math.isfinite(first) and math.isfinite(second)
    except (TypeError, ValueError):
        return False


def _open(
    source: Any,
    options: ReadOptions,
    maker: Callable[[], gym.Env[Any, Any]] | None,
) -> Source:
    if isinstance(source, list | tuple):
        return chain([_open(item, options, maker) for item in source])
    if isinstance(source, minari.MinariDataset):
        return minari_source(source, options)
    if isinstance(source, str | Path):
        path = Path(source)
        kind = path.suffix.lower()
        if kind in TABLE_FILES:
            if not path.is_file():
                raise DatasetError(f"{path}: no such file.")
            columns = open_npz(path) if kind == ".npz" else open_hdf5(path)
            return table_source(path.name, columns, _with_env(options, maker))
        if isinstance(source, Path):
            raise DatasetError(
                f"{path}: expected a .hdf5, .h5 or .npz file, or a Minari id as text."
            )
        return minari_source(find_minari(source, download=options.download), options)
    if isinstance(source, TensorDictBase | ReplayBuffer | Storage):
        return table_source(
            type(source).__name__, columns_of_tensordict(source), _with_env(options, maker)
        )
    if isinstance(source, Mapping):
        return table_source("arrays", flatten(source), _with_env(options, maker))
    raise DatasetError(
        f"source: {type(source).__name__} cannot be read; expected a Minari id, a path, a dict of "
        "arrays, a TensorDict, or a TorchRL replay buffer or storage."
    )


def _with_env(options: ReadOptions, maker: Callable[[], gym.Env[Any, Any]] | None) -> ReadOptions:
    """A table's spaces and step limit from its environment, where the options do not give them."""
    if maker is None:
        return options
    made = maker()
    steps = made.spec.max_episode_steps if made.spec is not None else None
    described = replace(
        options,
        observation_space=options.observation_space or made.observation_space,
        action_space=options.action_space or made.action_space,
        max_episode_steps=options.max_episode_steps or steps,
    )
    made.close()
    return described
