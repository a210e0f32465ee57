"""``load_dataset``: from any source to an ``OfflineDataset``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import minari
import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.build import build
from iql_torchrl.data.codec import UNCHANGED
from iql_torchrl.data.dataset import Description, OfflineDataset
from iql_torchrl.data.readers.d3rlpy import D3rlpyBuffer
from iql_torchrl.data.readers.environments import (
    EnvLike,
    adapted_env,
    env_maker,
    recorded_env,
)
from iql_torchrl.data.readers.huggingface import HuggingFaceTable
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import open_source
from iql_torchrl.data.reuse import load_or_build
from iql_torchrl.data.saved import is_saved, open_saved
from iql_torchrl.data.scaling import known_scores
from iql_torchrl.data.schema import DatasetError, DatasetWarning

SourceLike: TypeAlias = (
    "str | Path | minari.MinariDataset | Mapping[str, Any] | TensorDictBase | ReplayBuffer"
    " | Storage | D3rlpyBuffer | HuggingFaceTable | Sequence[Any]"
)
#: Options that cannot change a dataset that is built already.
FIXED = (
    "memmap", "concatenate", "limit", "columns", "clip_actions", "max_episode_steps",
    "reward_offset", "observation_space", "action_space", "autoreset",
)  # fmt: skip


def load_dataset(
    source: SourceLike,
    *,
    env: EnvLike | None = None,
    reward: str | tuple[float, float] = "raw",
    columns: Mapping[str, str | Sequence[str] | None] | None = None,
    reward_offset: int = 0,
    concatenate: Sequence[str] | None = None,
    limit: int | None = None,
    memmap: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    clip_actions: bool = False,
    max_episode_steps: int | None = None,
    autoreset: bool | None = None,
    reference_scores: tuple[float, float] | str | None = None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
    download: bool = True,
    progress: bool | None = None,
) -> OfflineDataset:
    """Read offline data, check it once, and return an ``OfflineDataset``.

    One row of a source is one step. Transitions are read, checked and written in chunks. Parquet, HDF5,
    Minari's, d3rlpy's and ``numpy.savez``'s files are read as chunks need them; CSV, JSON, compressed
    npz files, and rows that are sorted by ids, are in memory meanwhile.

    Args:
        source: a Minari id (downloaded only when absent) or ``MinariDataset``; a path to ``.npz``,
            ``.npy`` (structured), ``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.parquet`` or
            ``.hdf5``/``.h5`` (D4RL's layout, or written by d3rlpy); a folder of Parquet files, of
            LeRobot, or that ``datasets.save_to_disk`` wrote; a DataFrame (pandas, polars), Arrow table
            or DuckDB relation; a dict of arrays, a TensorDict, a TorchRL replay buffer, dataset or
            storage, a d3rlpy buffer, a ``datasets.Dataset``; or a list of these, joined (see
            ``readers.source.open_source``). A row of an Arrow table is an episode if its reward is a
            list. ``"ogbench/cube-single-play-singletask-task2-v0"`` is OGBench's data for one task,
            from npz files in the folder ``OGBENCH_DATASETS_PATH`` (else ``~/.ogbench/data``), never
            downloaded here. Or a folder that ``memmap=`` or ``python -m iql_torchrl.data build`` made,
            copied to any machine: then ``env``, ``reward`` (where it was built raw), ``dtype`` (the
            same) and ``reference_scores`` apply. What is larger than the memory: ``build_shards``.
        env: id, spec, instance or function; its spaces describe columns whose source declares none,
            and ``make_env`` makes it. Minari's own record is used where this is None.
        reward: ``"raw"``, ``"return_range"`` (1000 / (max - min episode return): the paper's
            locomotion), ``"minus_one"`` (AntMaze), or ``(scale, shift)``: r' = scale * r + shift.
        columns: maps our keys to the source's columns; common names are recognised
            (``readers.columns.NAMES``). ``observation``, ``action``, ``reward``,
            ``next_observation``, ``terminated``, ``not_terminated`` (its opposite: 0 where a row
            terminates), ``truncated``, ``episode`` (ids, numbers or text; rows are sorted by them if
            they take turns), ``env_index`` (the same for environments, whose episodes end by flags),
            ``time`` (gaps end episodes), ``valid`` (0 where a row is not a transition and only has the
            observation after the row before), ``action_mask``, ``next_action_mask``,
            ``action_log_prob`` or ``action_prob`` of the behaviour policy. None leaves an optional
            one out, and ``terminated`` where no row terminates. A list of columns of one number each,
            for ``observation``, ``next_observation`` or ``action``, is a vector of floats; of a Minari
            dataset it chooses leaves of the observation. ``a.b`` and ``a/b`` name the leaf b of a
            group a; ``a.0``, ``a.1``, ... are one array ``a``. How done flags and ids end episodes, and
            OGBench's ``masks``, ``terminals`` and ``valids``: ``readers.episodes.find_episodes``.
        reward_offset: 1 where a row's reward belongs to the action of the row before.
        concatenate: leaves of a Dict observation to join, in order, into one ``observation``; the
            environments of ``make_env`` join it too.
        limit: at most this many transitions: the first complete episodes. A first episode that is
            longer than the limit is cut, and truncated there.
        memmap: a folder for a memory-mapped dataset, built in bounded memory and reused while the
            files and options stay the same. Several processes may use the same folder: one builds,
            the others wait. The tensors are views of the files: changing them
            (``transitions["action"].mul_(2)``) changes the files, also for the next call; clone the
            transitions before you change them.
        dtype: of observations, continuous actions and rewards.
        clip_actions: clip continuous actions to their bounds; otherwise such actions are an error.
        max_episode_steps: cuts longer episodes where nothing says which rows are truncated; by default
            the environment's own limit.
        autoreset: True drops the row after each ended row, which a vector environment wrote when it
            reset itself; None does so where ``next_observation`` proves it, with a note; False never.
        reference_scores: (random, expert) raw returns, or a task of ``REFERENCE_RETURNS``.
        observation_space, action_space: in place of the source's or the environment's. Without any,
            they are made from the data, with a note of what was chosen (``readers.guess``): float
            actions within [-1, 1] get those bounds, others the data's range with a warning.
        download: False never uses the network.
        progress: a progress bar; None shows it on terminals only.

    Warns with ``DatasetWarning``, and adds the sentence to ``notes``, where something contradicts the
    flags: exactly (``readers.contradictions``), or by the distances between consecutive observations
    (``readers.hints``; these never change what is read). Also where dropped rows have much of the
    reward, a handful of rewards dominates, float32 removes changes of observations, episodes are longer
    than the environment's limit, actions look like encoded categories, or a dataset class of TorchRL
    has lost values. A memory-mapped dataset that is reused repeats its warnings.

    Raises:
        DatasetError: naming the key, the row of the source, the episode, what was expected and what
            to do.
    """
    options = ReadOptions(
        env=env, reward=reward, columns={} if columns is None else columns,
        reward_offset=reward_offset, concatenate=concatenate, limit=limit, dtype=dtype,
        clip_actions=clip_actions, max_episode_steps=max_episode_steps,
        observation_space=observation_space, action_space=action_space, autoreset=autoreset,
        download=download, progress=progress,
    )  # fmt: skip
    parts = source if isinstance(source, list | tuple) else ()
    if built := next((part for part in parts if is_saved(part)), None):
        raise DatasetError(f"{built}: a built dataset is loaded alone, not in a list of sources.")
    if is_saved(source):
        for name in FIXED:
            if value := memmap if name == "memmap" else getattr(options, name):
                raise DatasetError(
                    f"{source}: {name}={value!r} cannot be applied to a dataset that is built already; "
                    f"leave {name} out, or load the source with it."
                )
        table, description = open_saved(Path(source), reward, dtype)
    elif memmap is None:
        table, description = build(open_source(source, options), options)
    else:
        table, description = load_or_build(source, Path(memmap), options)
    return OfflineDataset(table, **dataset_fields(description, env, reference_scores))


def dataset_fields(
    description: Description, env: EnvLike | None, reference_scores: Any
) -> dict[str, Any]:
    """The fields of a ``DatasetSummary``; issues the warnings of the data.

    ``env`` and ``reference_scores``: of the user, in place of those of the data.
    """
    for text in description.warnings:
        warnings.warn(text, DatasetWarning, stacklevel=3)
    maker, spec = None if env is None else env_maker(env), description.env_spec
    if maker is None and spec is not None:
        maker = partial(recorded_env, spec)
    if maker and description.adaptation != UNCHANGED:
        maker = partial(adapted_env, maker, description.adaptation)
    scores = known_scores(reference_scores) or description.reference_scores
    return vars(description) | {"env": maker, "reference_scores": scores}
