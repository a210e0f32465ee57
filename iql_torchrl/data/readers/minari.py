"""Minari datasets: identified by their id, read one episode after the other."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.builtin import BUILTIN
from iql_torchrl.data.codec import (
    Adaptation,
    action_leaves,
    flat_action_space,
    has_tensor_form,
    join,
    leaf_of,
    leaf_spaces,
)
from iql_torchrl.data.readers.arrays import Column, Columns, columns_of_parts, package, reading
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError, Key
from iql_torchrl.descriptions import describe_space, one_line

MAIN_FILE = "main_data.hdf5"
#: Keys that ``columns`` may have, because others are fixed by Minari.
NAMED = ("observation", "action_mask", "action_log_prob")


def is_minari_id(source: Any) -> bool:
    """A text of the form ``namespace/name-v0``."""
    return isinstance(source, str) and re.fullmatch(r"[-_\w/]+-v\d+", source) is not None


def find_minari(dataset_id: str, *, download: bool) -> minari.MinariDataset:
    """The dataset of that id, local or, where absent and ``download``, fetched by Minari.

    Raises ``DatasetError`` in one sentence: for a malformed or unknown id it lists the local ids
    that come closest. The id of a built-in dataset, or one that differs from it in a letter or two,
    is never looked for on the network: the error says how to make the dataset.
    """
    if not is_minari_id(dataset_id):
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


def open_minari(dataset: minari.MinariDataset, options: ReadOptions) -> Columns:
    """The columns of a Minari dataset of any storage format, with its selection of episodes.

    Every step is a row, and ``next/observation`` is the observation after it. ``options.columns`` may
    choose leaves of a Dict or Tuple observation for ``observation``: a name (``"arm"``,
    ``"arm/speed"``), or a list of names. Leaves without a tensor form, such as texts, are left out. A
    mask of allowed actions is taken from an observation leaf or an info called ``action_mask`` (or
    what ``columns`` names), and is not part of the observation; ``action_log_prob`` likewise. Actions
    in a Dict or Tuple become one vector. ``notes`` says what was left out and changed.
    """
    name, observed = str(dataset.id), dataset.observation_space
    if options.reward_offset:
        raise DatasetError(f"{name}: reward_offset is for tables; Minari's rewards are aligned.")
    if unknown := set(options.columns) - set(NAMED):
        raise DatasetError(
            f"{name}: columns names {sorted(unknown)}, but Minari's own keys are fixed; only "
            f"{', '.join(NAMED)} can be named."
        )
    if not len(dataset.episode_indices):
        raise DatasetError(f"{name}: the dataset has no episodes.")
    flags, values, actions, notes = _flags(dataset), _reader(dataset), dataset.action_space, []
    if flat := isinstance(actions, gym.spaces.Dict | gym.spaces.Tuple):
        order = ", ".join(map("/".join, action_leaves(actions)))
        actions = flat_action_space(actions, name)
        notes.append(
            f"the actions are {describe_space(actions)}: the leaves {order}, in this order."
        )
    extras = {key: _extra(partial(values, 0), name, key, options) for key in NAMED[1:]}
    if "action_mask" not in options.columns and not isinstance(actions, gym.spaces.Discrete):
        extras["action_mask"] = ()
    mask = extras["action_mask"]
    leaf = "/".join(mask[1:]) if mask[:1] == ("observations",) else ""
    leaves, left_out = _chosen_leaves(observed, options, leaf, name)
    adaptation = Adaptation(leaves, mask=leaf, flat_action=flat)
    scores = [dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    known = None not in scores and float(scores[0]) < float(scores[1])
    if not known and None not in scores:
        notes.append(f"Minari's reference scores {scores} are unusable.")
    return Columns(
        name,
        _columns(dataset, flags, values, adaptation, extras, actions),
        observation_space=adaptation.observation_space(observed, name),
        action_space=actions,
        env_spec=dataset.env_spec,
        reference_scores=(float(scores[0]), float(scores[1])) if known else None,
        adaptation=adaptation,
        named=True,
        notes=(*notes, *left_out),
    )


def _columns(
    dataset: minari.MinariDataset, flags: list[NDArray[Any]], values: Callable[[int, Key], Any],
    adaptation: Adaptation, extras: Mapping[str, Key], actions: gym.Space[Any],
) -> dict[str, Column]:  # fmt: skip
    """What is read episode by episode; ``extras``: paths of optional columns, ``()`` without."""
    name, lengths = str(dataset.id), list(map(len, flags))
    kept = adaptation.sources(dataset.observation_space, name)
    sides = {"/".join(("observation", *key)): ("observations", *path) for key, path in kept.items()}
    sides |= {"action_mask": extras["action_mask"]} if extras["action_mask"] else {}
    taken = [("actions", *path) for path in action_leaves(dataset.action_space)]

    def array(number: int, path: Key, *rows: int) -> NDArray[Any]:
        found = values(number, path)
        if found is None or len(found) not in rows:
            raise DatasetError(
                f"{name}: episode {number} has {'no' if found is None else len(found)} rows of "
                f"{'/'.join(path)}, expected {rows[0]} (observations have one more than actions); the "
                "dataset is damaged."
            )
        return np.asarray(found)

    def read(number: int) -> dict[str, NDArray[Any]]:
        steps = lengths[number]
        parts = [array(number, path, steps) for path in taken]
        if adaptation.flat_action:
            parts = [join(parts, rows=True).reshape(-1, *(actions.shape or ()))]
        columns = {
            "action": parts[0],
            "reward": array(number, ("rewards",), steps).astype(np.float64),
        }
        for column, path in sides.items():
            both = array(number, path, steps + 1)
            columns |= {column: both[:-1], f"next/{column}": both[1:]}
        if path := extras["action_log_prob"]:  # infos may have an entry for the reset too
            logs = array(number, path, steps, steps + 1)
            columns["action_log_prob"] = logs[len(logs) - steps :]
        return columns

    return {
        "episode": np.repeat(np.arange(len(lengths)), lengths),
        **dict(zip(("terminated", "truncated"), np.concatenate(flags).T, strict=True)),
        **columns_of_parts(lengths, read, name),
    }


def _flags(dataset: minari.MinariDataset) -> list[NDArray[Any]]:
    """The flags of each selected episode: terminated and truncated, ``(steps, 2)``."""
    storage, names = dataset.storage, ("terminations", "truncations")
    indices, folder = [int(i) for i in dataset.episode_indices], Path(storage.data_path)
    with _reading(dataset):
        if storage.FORMAT == "hdf5":
            with h5py.File(folder / MAIN_FILE, "r") as file:
                return [np.stack([_stored(file, i, (n,)) for n in names], axis=1) for i in indices]
        arrow = package("pyarrow.dataset", "Minari's Arrow and Parquet files")
        skipped = {"ignore_prefixes": ["_", ".", "metadata.json"]}
        files = (arrow.dataset(folder / str(i), format=storage.FORMAT, **skipped) for i in indices)
        tables = [each.to_table(columns=list(names)) for each in files]
        # An episode's last row has an observation alone.
        return [np.stack([table[name].to_numpy() for name in names], 1)[:-1] for table in tables]


def _stored(file: h5py.File, index: int, path: Key) -> NDArray[Any]:
    """An array of an episode. h5py's other interface takes twice as long."""
    stored = h5py.h5d.open(file.id, "/".join((f"episode_{index}", *path)).encode())
    values = np.empty(stored.shape, stored.dtype)
    stored.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def _reader(dataset: minari.MinariDataset) -> Callable[[int, Key], Any]:
    """What gives the array at a path of the selected episode with a number, or None.

    Minari's reader reads and decodes all arrays of an episode; it is used where arrays are not stored
    as they are: Arrow's and Parquet's, compressed images, and Tuples.
    """
    indices = [int(i) for i in dataset.episode_indices]

    def direct(number: int, path: Key) -> Any:
        with _reading(dataset), suppress(KeyError):
            return _stored(file, indices[number], path)

    @lru_cache(maxsize=1)
    def episode(number: int) -> dict[str, Any]:
        # One at a time: given many, Minari's Arrow reader splits long episodes silently.
        with _reading(dataset):
            read = next(iter(dataset.iterate_episodes([indices[number]])))
        return {**vars(read), "infos": read.infos or {}}

    def decoded(number: int, path: Key) -> Any:
        read = episode(number)
        with suppress(LookupError, TypeError, ValueError):
            return leaf_of(read, path)

    if dataset.storage.FORMAT != "hdf5":
        return decoded
    with _reading(dataset):
        file = h5py.File(Path(dataset.storage.data_path) / MAIN_FILE, "r")
    for side in ("observations", "actions"):
        for path, leaf in leaf_spaces(getattr(dataset, f"{side[:-1]}_space"), ()).items():
            values = direct(0, (side, *path)) if has_tensor_form(leaf) else None
            if has_tensor_form(leaf) and (values is None or values.shape[1:] != leaf.shape):
                return decoded
    return direct


def _reading(dataset: minari.MinariDataset) -> AbstractContextManager[None]:
    """Errors of Minari and of HDF5 as ``DatasetError`` naming the files."""
    files = Path(dataset.storage.data_path)
    path = files / MAIN_FILE if dataset.storage.FORMAT == "hdf5" else files
    errors = (OSError, LookupError, ValueError, StopIteration)
    return reading(path, "not a complete Minari dataset", *errors)


def _extra(values: Callable[[Key], Any], name: str, key: str, options: ReadOptions) -> Key:
    """The path of an optional column, of which ``values`` are those of an episode; empty without."""
    column = options.named.get(key, key)
    if column is None:
        return ()
    candidates: list[Key] = [("observations", column), ("infos", column)]
    if key in options.named:
        candidates.insert(0, tuple(column.split("/")))
    path = next((path for path in candidates if values(path) is not None), ())
    if not path and key in options.named:
        raise DatasetError(
            f"{name}: columns maps {key} to {column!r}, but the episodes have none of "
            f"{', '.join(map('/'.join, candidates))}."
        )
    return path


def _chosen_leaves(
    space: gym.Space[Any], options: ReadOptions, mask: str, name: str
) -> tuple[tuple[str, ...], list[str]]:
    """Names of the observation's leaves that are kept, and a note on the others.

    No names: the observation is kept as it is. ``mask``: the leaf to leave out.
    """
    found = {"/".join(path): leaf for path, leaf in leaf_spaces(space, ()).items()}
    leaves = {key: leaf for key, leaf in found.items() if not mask or key != mask}
    usable = [key for key, leaf in leaves.items() if has_tensor_form(leaf)]
    asked, kept = options.columns.get("observation", ()), set[str]()
    if asked is None:
        raise DatasetError(f"{name}: observation cannot be left out.")
    for each in [asked] if isinstance(asked, str) else asked:
        form = each if each in leaves else each.replace(".", "/")
        below = {key for key in leaves if key == form or key.startswith(f"{form}/")}
        if not below or below == {form} - set(usable):
            raise DatasetError(
                f"{name}: columns maps observation to {each!r}; the observation is "
                f"{describe_space(space)}, whose leaves with a tensor form are "
                f"{', '.join(filter(None, usable)) or 'none'}."
            )
        kept |= below
    chosen = tuple(key for key in usable if not asked or key in kept)
    if not chosen:
        raise DatasetError(
            f"{name}: the observation is {describe_space(space)} and has no leaf with a tensor form; "
            "expected a Box, Discrete, MultiDiscrete or MultiBinary."
        )
    whole = len(chosen) == len(found) and Adaptation().observation_space(space, name) == space
    if whole and not asked:
        return (), []
    left = [
        repr(key) if key in usable else f"{key!r} (no tensor form: {type(leaf).__name__})"
        for key, leaf in leaves.items()
        if key not in chosen
    ]
    note = f"left out of the observation: {', '.join(left)}; kept: {', '.join(map(repr, chosen))}."
    return chosen, [note] if left else []
