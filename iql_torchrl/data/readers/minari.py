"""Minari datasets: identified by their id, read one episode after the other."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.builtin import BUILTIN
from iql_torchrl.data.readers.arrays import flatten, reading
from iql_torchrl.data.readers.source import Piece, ReadOptions, Source
from iql_torchrl.data.schema import (
    ACTION,
    LOG_PROB,
    MASK,
    REWARD,
    TERMINATED,
    TRUNCATED,
    DatasetError,
    Key,
    leaf_spaces,
)
from iql_torchrl.descriptions import one_line

#: What an episode has once a step; observations have one entry more: those before and after steps.
COLUMNS: dict[Key, str] = {
    ACTION: "actions", REWARD: "rewards", TERMINATED: "terminations", TRUNCATED: "truncations",
}  # fmt: skip
EVERY, BEFORE, AFTER = slice(None), slice(None, -1), slice(1, None)


def find_minari(dataset_id: str, *, download: bool) -> minari.MinariDataset:
    """The dataset of that id, local or, where absent and ``download``, fetched by Minari.

    Raises ``DatasetError`` in one sentence: for a malformed or unknown id it lists the local ids
    that come closest. The id of a built-in dataset, or one that differs from it in a letter or two,
    is never looked for on the network: the error says how to make the dataset.
    """
    if not re.fullmatch(r"[-_\w/]+-v\d+", dataset_id):
        raise DatasetError(
            f"{dataset_id!r} is neither a file nor a Minari id, which ends in a version such as "
            f"'pendulum/mixed-v0'{_closest(dataset_id)}."
        )
    try:
        return minari.load_dataset(dataset_id, download=False)
    except FileNotFoundError:
        pass
    except Exception as error:
        raise DatasetError(
            f"{dataset_id}: the local copy cannot be read ({type(error).__name__}: "
            f"{one_line(error)}); delete it and download it again."
        ) from error
    if meant := difflib.get_close_matches(dataset_id, BUILTIN, n=1, cutoff=0.9):
        raise DatasetError(
            f"{dataset_id}: no such local Minari dataset; this package makes {meant[0]!r}: run python "
            f"-m iql_torchrl.data make {meant[0]}, or call "
            f"iql_torchrl.data.builtin.ensure_dataset({meant[0]!r}){_closest(dataset_id)}."
        )
    if not download:
        raise DatasetError(f"{dataset_id}: no such local Minari dataset{_closest(dataset_id)}.")
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:
        raise DatasetError(
            f"{dataset_id}: not among the local Minari datasets and not downloaded "
            f"({type(error).__name__}: {one_line(error)}){_closest(dataset_id)}."
        ) from error


def _closest(dataset_id: str) -> str:
    local: list[str] = []
    # Errors and warnings of other datasets: the error that is being reported is more important.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        local = list(minari.list_local_datasets())
    near = difflib.get_close_matches(dataset_id, local, n=3, cutoff=0.4)
    if near:
        return f"; closest local ids: {', '.join(near)}"
    return f"; local ids: {', '.join(local[:5]) or 'there are none'}"


def minari_files(dataset: minari.MinariDataset) -> tuple[Path, ...]:
    """Every file of the dataset."""
    return tuple(sorted(p for p in Path(dataset.storage.data_path).rglob("*") if p.is_file()))


def minari_source(dataset: minari.MinariDataset, options: ReadOptions) -> Source:
    """A ``Source`` of a Minari dataset of any storage format, with its selection of episodes.

    Every step is a row; the last row's successor is the observation after the last step. A mask of
    allowed actions is taken from an observation leaf or an info called ``action_mask`` (or what
    ``columns`` names), and is removed from the observation.
    """
    name, actions = str(dataset.id), dataset.action_space
    if options.reward_offset:
        raise DatasetError(f"{name}: reward_offset is for tables; Minari's rewards are aligned.")
    unknown = set(options.named) - {"action_mask", "action_log_prob"}
    if unknown:
        raise DatasetError(
            f"{name}: columns names {sorted(unknown)}, but Minari's own keys are fixed; only "
            "action_mask and action_log_prob can be named."
        )
    lengths = _lengths(dataset)
    if not len(lengths):
        raise DatasetError(f"{name}: the dataset has no episodes.")
    first = next(_episodes(dataset))
    mask = _extra(first, name, "action_mask", options)
    if "action_mask" not in options.named and not isinstance(actions, gym.spaces.Discrete):
        mask = None
    log_prob = _extra(first, name, "action_log_prob", options)
    space, states = _observation(dataset.observation_space, mask)
    places = {key: (path, EVERY) for key, path in COLUMNS.items()}
    if mask is not None:
        states[MASK] = mask
    if log_prob is not None:
        places[LOG_PROB] = (log_prob, EVERY)
    for key, path in states.items():
        places |= {key: (path, BEFORE), ("next", *key): (path, AFTER)}

    def pieces() -> Iterator[Piece]:
        for number, episode in enumerate(_episodes(dataset)):
            yield _piece(episode, places, f"{name}: episode {number}")

    metadata = dataset.storage.metadata
    scores = (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    known = None not in scores and float(scores[0]) < float(scores[1])
    notes = () if known or None in scores else (f"Minari's reference scores {scores} are unusable",)
    return Source(
        name=name,
        observation_space=space,
        action_space=actions,
        episode_lengths=lengths,
        pieces=pieces,
        masked=mask is not None,
        log_prob=log_prob is not None,
        env_spec=dataset.env_spec,
        reference_scores=(float(scores[0]), float(scores[1])) if known else None,
        notes=notes,
    )


def _lengths(dataset: minari.MinariDataset) -> NDArray[np.int64]:
    """Steps of the selected episodes."""
    storage, indices = dataset.storage, [int(i) for i in dataset.episode_indices]
    with _reading(dataset):
        if storage.FORMAT != "hdf5":
            metadata = storage.get_episode_metadata(indices)
            return np.array([int(m["total_steps"]) for m in metadata], np.int64)
        # An episode that was written in two parts has the steps of the last one in its metadata.
        with h5py.File(Path(storage.data_path) / "main_data.hdf5", "r") as file:
            return np.array([file[f"episode_{i}/rewards"].shape[0] for i in indices], np.int64)


def _episodes(dataset: minari.MinariDataset) -> Iterator[dict[str, Any]]:
    """The arrays of each selected episode by their paths, such as ``observations/goal``."""
    indices = [int(i) for i in dataset.episode_indices]
    # One at a time: given many, Minari's Arrow reader splits long episodes silently.
    groups = [indices] if dataset.storage.FORMAT == "hdf5" else [[i] for i in indices]
    with _reading(dataset):
        for group in groups:
            for episode in dataset.iterate_episodes(group):
                arrays = {k: getattr(episode, k) for k in ("observations", *COLUMNS.values())}
                yield flatten({**arrays, "infos": episode.infos or {}})


def _reading(dataset: minari.MinariDataset) -> AbstractContextManager[None]:
    """Errors of Minari and of HDF5 as ``DatasetError`` naming the files."""
    files = Path(dataset.storage.data_path)
    path = files / "main_data.hdf5" if dataset.storage.FORMAT == "hdf5" else files
    return reading(path, "not a complete Minari dataset", OSError, KeyError)


def _extra(episode: Mapping[str, Any], name: str, key: str, options: ReadOptions) -> str | None:
    """The path of an optional column in the episodes."""
    column = options.named.get(key, key)
    if column is None:
        return None
    candidates = [f"observations/{column}", f"infos/{column}"]
    if key in options.named:
        candidates.insert(0, column)
    path = next((path for path in candidates if path in episode), None)
    if path is None and key in options.named:
        raise DatasetError(
            f"{name}: columns maps {key} to {column!r}, but the episodes have none of "
            f"{', '.join(candidates)}."
        )
    return path


def _observation(space: gym.Space[Any], mask: str | None) -> tuple[gym.Space[Any], dict[Key, str]]:
    """The space without the mask, and the path of each of its leaves in the episodes.

    A single remaining leaf becomes a plain observation without nesting.
    """
    within: tuple[str, ...] = ("observations",)
    if mask and mask.startswith("observations/") and isinstance(space, gym.spaces.Dict):
        leaves = {k: v for k, v in space.spaces.items() if f"observations/{k}" != mask}
        if len(leaves) == 1:
            within, space = ("observations", *leaves), next(iter(leaves.values()))
        else:
            space = gym.spaces.Dict(leaves)
    return space, {key: "/".join((*within, *key[1:])) for key in leaf_spaces(space)}


def _piece(
    episode: Mapping[str, Any], places: Mapping[Key, tuple[str, slice]], subject: str
) -> Piece:
    """The rows of an episode; ``places``: by key the path of its values, and which of them it has."""
    piece, steps = {}, len(episode["actions"])
    for key, (path, part) in places.items():
        values, rows = episode.get(path), steps + (part != EVERY)
        if key == LOG_PROB and values is not None and len(values) == steps + 1:
            values = values[1:]  # infos have an entry for the reset too
        if values is None or len(values) != rows:
            raise DatasetError(
                f"{subject} has {'no' if values is None else len(values)} rows of {path}, expected "
                f"{rows} (observations have one more than actions); the dataset is damaged."
            )
        piece[key] = np.asarray(values)[part]
    return piece
