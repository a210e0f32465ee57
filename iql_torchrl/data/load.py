"""``load_dataset``: from a source, or its dataset on disk, to an ``OfflineDataset``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import minari
import numpy as np
import torch
from minari.serialization import serialize_space
from tensordict import TensorDict

from iql_torchrl.data.build import build
from iql_torchrl.data.codec import UNCHANGED
from iql_torchrl.data.dataset import Description, OfflineDataset
from iql_torchrl.data.digests import digest
from iql_torchrl.data.readers.environments import (
    EnvLike,
    adapted_env,
    env_maker,
    recorded_env,
)
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import open_source, source_files
from iql_torchrl.data.saved import (
    RECORD,
    Location,
    SavedDataset,
    is_saved,
    is_sharded,
    open_saved,
    read_record,
    write_dataset,
)
from iql_torchrl.data.scaling import known_scores
from iql_torchrl.data.schema import DatasetError, DatasetWarning
from iql_torchrl.files import folder_lock, make_folder

#: Tables of packages that are not imported here have no common base class.
SourceLike: TypeAlias = Any
#: Options that cannot change a dataset that is built already.
FIXED = (
    "memmap", "concatenate", "limit", "columns", "clip_actions", "max_episode_steps",
    "reward_offset", "observation_space", "action_space", "autoreset",
)  # fmt: skip
#: A file up to ``WHOLE`` bytes is digested completely; of a larger one so many chunks of so many
#: bytes are. Many files share these numbers.
WHOLE = 16 * 2**20
CHUNKS, CHUNK = 64, 64 * 2**10


def load_dataset(
    source: SourceLike,
    *,
    env: EnvLike | None = None,
    reward: str | tuple[float, float] | None = "raw",
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
    npz files, Parquet files in partitions (``day=3``), and rows that are sorted by ids, are in memory
    meanwhile.

    Args:
        source: a Minari id (downloaded only when absent) or a ``MinariDataset``; a path to ``.hdf5``
            (D4RL's layout, or of d3rlpy), ``.npz``, ``.npy``, ``.csv``, ``.tsv``, ``.json``,
            ``.jsonl``, ``.parquet``, or a folder (LeRobot's, of ``datasets.save_to_disk``, of Parquet
            files); a dict of arrays, a DataFrame, a TensorDict, a TorchRL buffer, dataset or storage,
            a d3rlpy buffer, a ``datasets.Dataset``; an OGBench id (``readers.ogbench``); or a list of
            these, joined if their spaces agree. A row is a step, or an episode if its reward is a
            list. Or a folder that ``memmap=`` or ``python -m iql_torchrl.data build`` made: of the
            options, ``env``, ``reward`` (where it was built raw), ``dtype`` (the same) and
            ``reference_scores`` apply. Data larger than the memory: ``build_shards``.
        env: id, spec, instance or function; its spaces describe a table's columns, and
            ``make_env`` makes it. Minari's own record is used where this is None.
        reward: ``"raw"`` or None, ``"return_range"`` (1000 / (max - min episode return): the paper's
            locomotion), ``"minus_one"`` (AntMaze), or ``(scale, shift)``: r' = scale * r + shift.
        columns: maps our keys, those of ``readers.columns.NAMES``, to the file's columns; None leaves
            one out (``terminated``: no row terminates). ``not_terminated`` is 0 where a row
            terminates; ``valid`` is 0 where a row only has the observation after the row before. A
            list of columns of one number each, for observations or actions, is joined to a vector of
            floats. ``a.b`` and ``a/b`` name the leaf b of a group a. Common names are recognised;
            for ``masks`` and ``terminals`` in one file see ``readers.boundaries.find_episodes``.
        reward_offset: 1 where a row's reward belongs to the action of the row before.
        concatenate: leaves of a Dict observation to join, in order, into one ``observation``; the
            environments of ``make_env`` join it too.
        limit: at most this many transitions: the first complete episodes. A first episode that is
            longer than the limit is cut, and truncated there.
        memmap: a folder for a memory-mapped table, built in bounded memory and reused while the
            files and options stay the same, also by several processes: one builds, the others wait.
            Changing its tensors changes the files; clone the transitions before you change them.
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

    Warns with ``DatasetWarning``, and adds the sentence to ``notes``, where done flags contradict the
    rows or episode boundaries do not lie at discontinuities (``readers.boundaries``,
    ``readers.hints``), where float32 removes changes of float64 observations, actions look like
    encoded categories, most rows are dropped, or a source has lost values or is not read completely.
    A memory-mapped table that is reused repeats its warnings.

    Raises:
        DatasetError: naming the key, the row of the source, the episode, what was expected and what
            to do.
    """
    options = ReadOptions(
        env=env, reward="raw" if reward is None else reward, columns={} if columns is None else columns,
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
        table, description = open_saved(Path(source), options.reward, dtype)
    else:
        options = options if env is None else options.described()
        if memmap is None:
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
    scores = description.reference_scores
    if reference_scores is not None:
        scores = known_scores(reference_scores)
    return vars(description) | {"env": maker, "reference_scores": scores}


def load_or_build(
    source: Any, folder: Path, options: ReadOptions
) -> tuple[TensorDict, Description]:
    """Return the dataset in ``folder`` if it was built from the same source and options, else build it.

    Other processes and threads that use the folder wait meanwhile (see ``folder_lock``), so that they
    cannot replace the dataset before it is returned.
    """
    built_from = identity(source, options)
    if not os.path.isdir(folder):  # one that is there may be opened without the right to write
        make_folder("memmap", folder, above=True, error=DatasetError)
    folder = folder.resolve()  # a link stays one
    with folder_lock(folder):
        saved = _reusable(folder, built_from)
        if saved is None:
            make_folder("memmap", folder, above=True, error=DatasetError)
            opened = open_source(source, options)
            edges = np.array([0, len(opened.episode_lengths)])
            saved = write_dataset(opened, folder, edges, options, built_from)
        return saved.load(saved.description.reward_map)


def _reusable(folder: Path, built_from: dict[str, Any]) -> SavedDataset | None:
    """The dataset in ``folder`` if it was built from the same; None if it is to be built.

    Raises ``DatasetError`` if the folder contains anything else, which is never overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    saved = None
    if (folder / RECORD).is_file() and not is_sharded(folder):
        try:
            saved = read_record(Location(str(folder)))
            saved.check(contents=False)
        except DatasetError:
            return None  # Written by another version, or damaged: it is built again.
    if saved is None or saved.source is None:
        raise DatasetError(
            f"memmap={folder}: exists and was not made by load_dataset; choose another path."
        )
    return saved if built_from["files"] and saved.source == built_from else None


def identity(source: Any, options: ReadOptions) -> dict[str, Any]:
    """Everything that a dataset depends on: size, time and content of each file, and the options.

    Of a file larger than 16 MiB the digest is of 64 chunks of 64 KiB at even distances, so that a file
    of any size is digested in milliseconds; a change between them is noticed by size and time only.
    Each of n files gets an n-th of both numbers, but at least one chunk and 3 chunks. Without files
    (data in memory) a dataset is never reused.
    """
    files = source_files(source, options)
    records = [
        [str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns, digest(_sampled(p, len(files)))]
        for p in files
    ]
    digests = {
        name: digest([serialize_space(space).encode()])  # texts of spaces shorten their bounds
        for name in ("observation_space", "action_space")
        if (space := getattr(options, name)) is not None
    }
    # Of an environment the limit and the spaces decide, which may change under its id.
    irrelevant = dict.fromkeys(("env", "download", "progress"))
    decisive = {**vars(options), **digests, **irrelevant, "source": _source_identity(source)}
    return {"files": records, "options": {name: repr(value) for name, value in decisive.items()}}


def _source_identity(source: Any) -> Any:
    """Names and paths, and which episodes of a Minari dataset, in the lists that the source has."""
    if isinstance(source, list | tuple):
        return [_source_identity(part) for part in source]
    if isinstance(source, minari.MinariDataset) and len(source) != source.storage.total_episodes:
        return digest([str(list(map(int, source.episode_indices))).encode()])
    return source if isinstance(source, str | Path) else None


def _sampled(path: Path, files: int) -> Iterator[bytes]:
    size, chunks = path.stat().st_size, max(CHUNKS // files, 3)
    whole = size <= max(WHOLE // files, CHUNK)
    places = [(size - CHUNK) * number // (chunks - 1) for number in range(chunks)]
    with path.open("rb", buffering=0) as file:
        for place in range(0, size, CHUNK) if whole else places:
            file.seek(place)
            yield file.read(CHUNK)
