"""Minari datasets: identified by their id, read one episode after the other."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.dataset.minari_storage import is_image_space
from numpy.typing import NDArray

from iql_torchrl.data.builtin import BUILTIN
from iql_torchrl.data.readers.source import Piece, ReadOptions, Source, first_episodes
from iql_torchrl.data.schema import (
    ACTION,
    LOG_PROB,
    MASK,
    NEXT_MASK,
    REWARD,
    TERMINATED,
    TRUNCATED,
    DatasetError,
    Key,
    leaf_spaces,
)
from iql_torchrl.descriptions import one_line

__all__ = ["find_minari", "minari_files", "minari_source"]

_ID = re.compile(r"[-_\w/]+-v\d+")
#: Reads one array of one episode by its path, such as ``observations/goal``; None when absent.
Reader: TypeAlias = Callable[[str], "NDArray[Any] | None"]


def find_minari(dataset_id: str, *, download: bool) -> minari.MinariDataset:
    """The dataset of that id, local or, where absent and ``download``, fetched by Minari.

    Raises ``DatasetError`` in one sentence: for a malformed or unknown id it lists the local ids
    that come closest. The id of a built-in dataset, or one that differs from it in a letter or two,
    is never looked for on the network: the error says how to make the dataset.
    """
    if not _ID.fullmatch(dataset_id):
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
            f"{dataset_id}: the local copy cannot be read ({_reason(error)}); delete and "
            "download it again."
        ) from error
    if not download:
        raise DatasetError(f"{dataset_id}: no such local Minari dataset{_closest(dataset_id)}.")
    if meant := difflib.get_close_matches(dataset_id, BUILTIN, n=1, cutoff=0.9):
        raise DatasetError(
            f"{dataset_id}: no such local Minari dataset; this package makes {meant[0]!r}: run "
            f"python -m iql_torchrl.data make {meant[0]}, or call "
            f"iql_torchrl.data.builtin.ensure_dataset({meant[0]!r}). python -m iql_torchrl.data list "
            "shows all."
        )
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:
        raise DatasetError(
            f"{dataset_id}: not among the local Minari datasets and not downloaded "
            f"({_reason(error)}){_closest(dataset_id)}."
        ) from error


def _closest(dataset_id: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other datasets
        try:
            local = list(minari.list_local_datasets())
        except Exception:  # the error that is being reported is more important
            local = []
    near = difflib.get_close_matches(dataset_id, local, n=3, cutoff=0.4)
    if near:
        return f"; closest local ids: {', '.join(near)}"
    return f"; local ids: {', '.join(local[:5])}" if local else "; there are no local datasets"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}".rstrip(". ")


def minari_source(dataset: minari.MinariDataset, options: ReadOptions) -> Source:
    """A ``Source`` of a Minari dataset of any storage format, with its selection of episodes.

    Every step is a row; the last row's successor is the observation after the last step. A mask of
    allowed actions is taken from an observation leaf or an info called ``action_mask`` (or what
    ``columns`` names), and is removed from the observation.
    """
    name = str(dataset.spec.dataset_id)
    if options.reward_offset:
        raise DatasetError(f"{name}: reward_offset is for tables; Minari's rewards are aligned.")
    unknown = set(options.columns) - {"action_mask", "action_log_prob"}
    if unknown:
        raise DatasetError(
            f"{name}: columns names {sorted(unknown)}, but Minari's own keys are fixed; only "
            "action_mask and action_log_prob can be named."
        )
    episodes = _Episodes(dataset, name)
    lengths = first_episodes(episodes.lengths(), options.limit)
    if not len(lengths):
        raise DatasetError(f"{name}: the dataset has no episodes.")
    plan = _plan(episodes, dataset, options)

    def pieces() -> Iterator[Piece]:
        with episodes.opened() as reader_of:
            for episode, length in enumerate(lengths):
                piece = _piece(reader_of(episode), plan, name, episode)
                if len(piece[ACTION]) > length:
                    piece = {key: values[:length] for key, values in piece.items()}
                yield piece

    metadata = dataset.storage.metadata
    scores = (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    known = None not in scores and float(scores[0]) < float(scores[1])
    notes = () if known or None in scores else (f"Minari's reference scores {scores} are unusable",)
    return Source(
        name=name,
        observation_space=plan.observation_space,
        action_space=dataset.action_space,
        episode_lengths=lengths,
        pieces=pieces,
        masked=plan.mask is not None,
        log_prob=plan.log_prob is not None,
        ends_known=options.limit is None,
        env_spec=dataset.env_spec,
        reference_scores=(float(scores[0]), float(scores[1])) if known else None,
        notes=notes,
    )


def minari_files(dataset: minari.MinariDataset) -> tuple[Path, ...]:
    """Every file of the dataset."""
    return tuple(sorted(p for p in Path(dataset.storage.data_path).rglob("*") if p.is_file()))


class _Episodes:
    """Opens episodes by position in the dataset's own selection."""

    def __init__(self, dataset: minari.MinariDataset, name: str) -> None:
        self.storage, self.name = dataset.storage, name
        self.indices = [int(i) for i in dataset.episode_indices]
        spaces = [*leaf_spaces(dataset.observation_space).values(), dataset.action_space]
        # Pictures need Minari's own decoding; plain arrays are read from the file.
        plain = not any(is_image_space(s) for s in spaces)
        self.file = Path(self.storage.data_path) / "main_data.hdf5"
        self.direct = plain and self.storage.FORMAT == "hdf5"

    def lengths(self) -> NDArray[np.int64]:
        if not self.direct:
            metadata = self.storage.get_episode_metadata(self.indices)
            return np.array([int(m["total_steps"]) for m in metadata], np.int64)
        with self._h5() as file:
            return np.array([file[f"episode_{i}/rewards"].shape[0] for i in self.indices], np.int64)

    @contextmanager
    def _h5(self) -> Iterator[Any]:
        try:
            with h5py.File(self.file, "r") as file:
                yield file
        except (OSError, KeyError) as error:
            raise DatasetError(
                f"{self.file}: not a complete HDF5 file ({_reason(error)}); delete it and download "
                "or write the dataset again."
            ) from error

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], Reader]]:
        """Yield a function from the position of an episode to its ``Reader``."""
        if not self.direct:
            yield self._decoded
            return
        with self._h5() as file:

            def reader_of(position: int) -> Reader:
                group = file[f"episode_{self.indices[position]}"]

                def read(path: str) -> NDArray[Any] | None:
                    entry = group.get(path)
                    return None if entry is None else np.asarray(entry[()])

                return read

            yield reader_of

    def _decoded(self, position: int) -> Reader:
        # One at a time: given many, Minari's Arrow reader splits long episodes silently.
        episode = next(iter(self.storage.get_episodes([self.indices[position]])))

        def read(path: str) -> NDArray[Any] | None:
            entry: Any = episode
            for part in path.split("/"):
                if not isinstance(entry, dict) or part not in entry:
                    return None
                entry = entry[part]
            return np.asarray(entry)

        return read


@dataclass(frozen=True)
class _Plan:
    observation_space: gym.Space[Any]
    paths: dict[Key, str]
    action_space: gym.Space[Any]
    mask: str | None
    log_prob: str | None


def _plan(episodes: _Episodes, dataset: minari.MinariDataset, options: ReadOptions) -> _Plan:
    space, actions = dataset.observation_space, dataset.action_space
    with episodes.opened() as reader_of:
        read = reader_of(0)
        mask = _extra(read, episodes.name, "action_mask", options)
        if "action_mask" not in options.columns and not isinstance(actions, gym.spaces.Discrete):
            mask = None
        log_prob = _extra(read, episodes.name, "action_log_prob", options)
    if mask and mask.startswith("observations/") and isinstance(space, gym.spaces.Dict):
        mask_name = mask.removeprefix("observations/")
        leaves = {k: v for k, v in space.spaces.items() if k != mask_name}
        # A single remaining leaf becomes a plain observation without nesting.
        space = gym.spaces.Dict(leaves) if len(leaves) != 1 else next(iter(leaves.values()))
        paths = {
            key: "/".join(("observations", *((*key[1:],) if len(leaves) != 1 else tuple(leaves))))
            for key in leaf_spaces(space)
        }
    else:
        paths = {key: "/".join(("observations", *key[1:])) for key in leaf_spaces(space)}
    return _Plan(space, paths, actions, mask, log_prob)


def _extra(read: Reader, name: str, key: str, options: ReadOptions) -> str | None:
    """The path of an optional column in the episodes."""
    column = options.columns.get(key, key)
    if column is None:
        return None
    candidates = [f"observations/{column}", f"infos/{column}"]
    if key in options.columns:
        candidates.insert(0, column)
    for path in candidates:
        if read(path) is not None:
            return path
    if key in options.columns:
        raise DatasetError(
            f"{name}: columns maps {key} to {column!r}, but the episodes have none of "
            f"{', '.join(candidates)}."
        )
    return None


def _piece(read: Reader, plan: _Plan, name: str, episode: int) -> Piece:
    piece: Piece = {ACTION: _need(read, "actions", name, episode)}
    steps = len(piece[ACTION])
    for key, path in (
        (REWARD, "rewards"),
        (TERMINATED, "terminations"),
        (TRUNCATED, "truncations"),
    ):
        piece[key] = _sized(_need(read, path, name, episode), steps, path, name, episode)
    for key, path in plan.paths.items():
        values = _sized(_need(read, path, name, episode), steps + 1, path, name, episode)
        piece[key], piece[("next", *key)] = values[:-1], values[1:]
    if plan.mask is not None:
        values = _need(read, plan.mask, name, episode)
        values = _sized(values, steps + 1, plan.mask, name, episode)
        piece[MASK], piece[NEXT_MASK] = values[:-1], values[1:]
    if plan.log_prob is not None:
        # Infos have an entry for the reset too, which precedes the first action.
        values = _need(read, plan.log_prob, name, episode)
        if len(values) == steps + 1:
            values = values[1:]
        piece[LOG_PROB] = _sized(values, steps, plan.log_prob, name, episode)
    return piece


def _need(read: Reader, path: str, name: str, episode: int) -> NDArray[Any]:
    values = read(path)
    if values is None:
        raise DatasetError(f"{name}: episode {episode} has no {path}; the dataset is incomplete.")
    return values


def _sized(values: NDArray[Any], rows: int, path: str, name: str, episode: int) -> NDArray[Any]:
    if len(values) != rows:
        raise DatasetError(
            f"{name}: {path} of episode {episode} has {len(values)} rows, expected {rows} "
            "(observations have one more than actions); the dataset is damaged."
        )
    return values
