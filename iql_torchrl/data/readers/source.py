"""``open_source``: from what a user passes to columns, their episodes, and the spaces of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.codec import joined_leaves, leaf_spaces, transition_layout
from iql_torchrl.data.dataset import Description
from iql_torchrl.data.readers import arrays, d3rlpy, frames, json_files, ogbench
from iql_torchrl.data.readers.arrays import Columns, side_by_side
from iql_torchrl.data.readers.boundaries import Episodes, find_episodes
from iql_torchrl.data.readers.columns import log_probabilities, name_columns, number_texts
from iql_torchrl.data.readers.csv_files import open_csv
from iql_torchrl.data.readers.guess import guess_action_space, guess_observation_space
from iql_torchrl.data.readers.minari import find_minari, is_minari_id, open_minari
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.torchrl_datasets import open_torchrl
from iql_torchrl.data.schema import DatasetError, Layout

#: What reads the columns of a file, by its suffix.
FILES: dict[str, Callable[[Path, ReadOptions], Columns]] = {
    **dict.fromkeys((".hdf5", ".h5"), d3rlpy.open_d3rlpy_file),
    ".parquet": lambda path, options: _open_arrow(path, options),
    ".npz": lambda path, _: Columns(path.name, arrays.open_npz(path)),
    ".npy": lambda path, _: Columns(path.name, json_files.open_npy(path)),
    **dict.fromkeys((".csv", ".tsv"), lambda path, _: open_csv(path)),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), json_files.open_json),
}
EXPECTED = (
    f"a file of one of the kinds {', '.join(FILES)}, a folder of Parquet files, of LeRobot or of "
    "datasets.save_to_disk, or a Minari id"
)


@dataclass(frozen=True, kw_only=True)
class Source(Description):
    """Everything about a source that is known before its transitions are read.

    ``parts``: the named columns and the episodes of each joined dataset, in their order. ``layout``:
    the entries of transitions. ``guessed``: ``"observation"`` and ``"action"`` where the space was made
    from the data. Returns and statistics are not known yet.
    """

    parts: Sequence[tuple[Columns, Episodes]]
    layout: Layout
    guessed: frozenset[str]


def open_source(source: Any, options: ReadOptions) -> Source:
    """What ``load_dataset`` reads, with joined leaves and at most ``limit`` transitions.

    A list or tuple is joined: spaces that a source or ``options`` declare must be equal, spaces that
    are made from the data hold all of them.
    """
    items = _items(source)
    if not items:
        raise DatasetError("source: an empty list; name at least one dataset.")
    opened = [open_columns(item, options) for item in items]
    for number, item in enumerate(items):
        if len(items) > 1 and isinstance(item, Mapping):
            opened[number] = replace(opened[number], name=f"dataset {number + 1}")
    named = number_texts([name_columns(each, options) for each in opened])
    parts, left = list[tuple[Columns, Episodes]](), options.limit
    for columns in named:
        ordered, episodes = find_episodes(columns, options)
        ordered = log_probabilities(_whole_next(ordered, episodes), episodes.rows)
        if left is not None and parts and (episodes.lengths[:1] > left).any():
            break  # only the first episode of all may be cut
        total = len(episodes.rows)
        if left is not None:
            episodes = episodes.limited(left)
            left -= len(episodes.rows)
        parts.append((ordered, episodes))
        if left == 0 or len(episodes.rows) < total:
            break
    return _joined(parts, options)


def _whole_next(columns: Columns, episodes: Episodes) -> Columns:
    """With next observations as integers that are floats because some, after terminations, are missing.

    The missing ones, which are never used, become the observations of their rows.
    """
    changed = dict(columns.columns)
    for key, here in columns.leaves("observation").items():
        path = "/".join(("next", *key))
        after = changed.get(path)
        kinds = None if after is None else (np.dtype(after.dtype).kind, np.dtype(here.dtype).kind)
        if after is None or kinds not in (("f", "i"), ("f", "u")):
            continue
        values = np.array(after[:])
        missing = np.isnan(values)
        bootstrapped = episodes.rows[~episodes.terminated]
        if missing.any() and not missing[bootstrapped].any():
            values[missing] = np.asarray(here[:])[missing]
            if (values == np.rint(values)).all():
                changed[path] = values.astype(here.dtype)
    return replace(columns, columns=changed)


def _items(source: Any) -> list[Any]:
    """The sources in a list, also of lists; or the source itself."""
    nested = isinstance(source, list | tuple)
    return [item for part in source for item in _items(part)] if nested else [source]


def _joined(parts: list[tuple[Columns, Episodes]], options: ReadOptions) -> Source:
    columns, first = [each for each, _ in parts], parts[0][0]
    notes, warned = list[str](), dict[str, list[str]]()  # names by warning
    for each, episodes in parts:
        prefix = f"{each.name}: " if len(parts) > 1 else ""
        notes += [prefix + note for note in (*each.notes, *episodes.notes)]
        for text in (*each.warnings, *episodes.warnings):
            warned.setdefault(text.removeprefix(f"{each.name}: "), []).append(each.name)
    warnings = [
        f"{names[0]}: {text}" + f" The same of {len(names) - 1} more." * (len(names) > 1)
        for text, names in warned.items()
    ]
    for optional in ("action_mask", "action_log_prob"):
        have = [each.name for each in columns if optional in each.columns]
        if have and len(have) < len(columns):
            lacks = next(each.name for each in columns if optional not in each.columns)
            raise DatasetError(
                f"{lacks}: has no {optional}, but {have[0]} has; leave it out with "
                f"columns={{{optional!r}: None}}, or join only datasets that have it."
            )
    observation, action, guessed = _spaces(columns, options, notes, warnings)
    same_env = all(each.env_spec == first.env_spec for each in columns)
    same_scores = all(each.reference_scores == first.reference_scores for each in columns)
    if not same_env:
        notes.append("the joined datasets name different environments; none is used.")
    adaptation = first.adaptation
    if options.concatenate:
        parts, observation = _concatenated(parts, observation, options.concatenate)
        adaptation = replace(adaptation, concatenate=tuple(options.concatenate))
    return Source(
        name=" + ".join(each.name for each in columns),
        parts=parts,
        episode_lengths=np.concatenate([episodes.lengths for _, episodes in parts]),
        layout=transition_layout(
            observation, action, dtype=options.dtype,
            masked="action_mask" in first.columns, log_prob="action_log_prob" in first.columns,
        ),
        observation_space=observation,
        action_space=action,
        guessed=guessed,
        adaptation=adaptation,
        env_spec=first.env_spec if same_env else None,
        reference_scores=first.reference_scores if same_scores else None,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )  # fmt: skip


def _spaces(
    columns: list[Columns], options: ReadOptions, notes: list[str], warnings: list[str]
) -> tuple[gym.Space[Any], gym.Space[Any], frozenset[str]]:
    """The spaces of observations and actions, and which of the two are made from the data.

    A space is that of the options, of the sources, or of the environment, in this order. Raises unless
    sources agree, and observations have the leaves of their space.
    """
    found, guessed = dict[str, Any](), set[str]()
    for key, guess in (("observation", guess_observation_space), ("action", guess_action_space)):
        name = f"{key}_space"
        given = [(each.name, getattr(each, name)) for each in columns]
        known = [(source, space) for source, space in given if space is not None]
        found[key] = getattr(options, name) or getattr(options, f"env_{name}")
        if known and getattr(options, name) is None:
            found[key] = known[0][1]
            if other := next(((s, space) for s, space in known if space != known[0][1]), None):
                raise DatasetError(
                    f"{other[0]}: {name} is {other[1]}, but {known[0][0]} has {known[0][1]}; only "
                    "datasets of the same spaces can be joined."
                )
        if found[key] is None:
            guessed.add(key)
            found[key], texts, warning = guess(columns)
            notes += texts
            warnings += [f"{columns[0].name}: {warning}"] if warning else []
    expected = leaf_spaces(found["observation"]).keys()
    for part in columns:
        if (leaves := part.leaves("observation").keys()) != expected:
            raise DatasetError(
                f"{part.name}: the data has the leaves {', '.join(map('.'.join, leaves))}; its spaces "
                f"have {', '.join(map('.'.join, expected))}; expected the same: pass the env the data "
                "came from."
            )
    return found["observation"], found["action"], frozenset(guessed)


def _concatenated(
    parts: list[tuple[Columns, Episodes]], space: gym.Space[Any], names: Sequence[str]
) -> tuple[list[tuple[Columns, Episodes]], gym.Space[Any]]:
    """The leaves ``names`` of a Dict observation joined, in that order, into one flat observation.

    ``DatasetError`` for a plain observation, an unknown name, or leaves that are not Boxes of floats.
    """
    owner, joined = " + ".join(columns.name for columns, _ in parts), []
    leaves = joined_leaves(leaf_spaces(space, ()), names, owner)
    for columns, episodes in parts:
        kept = {k: v for k, v in columns.columns.items() if "observation" not in k.split("/")}
        for side in ("observation", "next/observation"):
            paths = ["/".join((side, *key)) for key in leaves]
            if all(path in columns.columns for path in paths):
                kept[side] = side_by_side([columns.columns[path] for path in paths])
        joined.append((replace(columns, columns=kept), episodes))
    return joined, gym.spaces.flatten_space(gym.spaces.Tuple(leaves.values()))


# -- opening


def open_columns(source: Any, options: ReadOptions) -> Columns:
    """The columns of one source, by their names in it. Raises ``DatasetError`` saying what is read."""
    if isinstance(source, minari.MinariDataset):
        return open_minari(source, options)
    if not isinstance(source, str | Path):
        return _open_object(source, options)
    if is_table_path(source):
        path = Path(source)
        if not path.exists():
            raise DatasetError(f"{path}: no such file.")
        reader = _open_arrow if path.is_dir() else FILES[path.suffix.lower()]
        return reader(path, options)
    if os.path.lexists(source) and not is_minari_id(source):
        raise DatasetError(
            f"{source}: exists, but is not of a kind that is read; expected {EXPECTED}."
        )
    if isinstance(source, Path):
        raise DatasetError(f"{source}: no such file; expected {EXPECTED} as text.")
    if ogbench.is_ogbench(source):
        return ogbench.open_ogbench(source, options)
    return open_minari(find_minari(source, download=options.download), options)


def source_files(source: Any, options: ReadOptions) -> tuple[Path, ...]:
    """Every file that the source reads; empty where a part is in memory."""
    if isinstance(source, list | tuple):
        parts = [source_files(item, options) for item in source]
        return tuple(path for part in parts for path in part) if all(parts) else ()
    if not (isinstance(source, str | Path) and is_table_path(source)):
        if ogbench.is_ogbench(source):
            return (ogbench.ogbench_file(source),)
        if isinstance(source, str) and (is_minari_id(source) or not os.path.lexists(source)):
            source = find_minari(source, download=options.download)
        if not isinstance(source, minari.MinariDataset):
            return ()
        source = source.storage.data_path
    path, others = Path(source), tuple[Path, ...]()
    if path.is_dir():
        return tuple(sorted(p for p in path.rglob("*") if p.is_file()))
    with suppress(DatasetError):  # a damaged file is refused when it is read
        if path.suffix.lower() in (".hdf5", ".h5") and path.is_file():
            others = arrays.hdf5_parts(path, arrays.hdf5_arrays(path))
    return (path, *others) if path.is_file() else ()


def is_table_path(source: str | Path) -> bool:
    """A path or text names a file or folder that is a table of steps."""
    path = Path(source)
    if path.suffix.lower() in FILES:
        return True
    # os.path: a text may be too long for a path.
    return os.path.isdir(source) and (
        (path / "meta" / "info.json").is_file()  # of LeRobot
        or frames.is_saved_dataset(path)
        or next(path.rglob("*.parquet"), None) is not None
    )


def _open_arrow(path: Path, options: ReadOptions) -> Columns:
    """The columns of a Parquet file, or of a folder of LeRobot, ``save_to_disk`` or Parquet files."""
    from iql_torchrl.data.readers.arrow import arrow_columns
    from iql_torchrl.data.readers.parquet import parquet_files, parquet_rows

    if frames.is_saved_dataset(path):
        return frames.open_datasets(path, options.named)
    if (path / "meta" / "info.json").is_file():
        from iql_torchrl.data.readers.lerobot import open_lerobot

        return open_lerobot(path, options)
    files, folder = ([path], path.parent) if path.is_file() else (parquet_files(path), path)
    table = parquet_rows(path.name, files, folder)
    return Columns(path.name, arrow_columns(table, options.named))


def _open_object(source: Any, options: ReadOptions) -> Columns:
    """The columns of an object in memory."""
    name = type(source).__name__
    if isinstance(source, TensorDictBase | ReplayBuffer | Storage):
        return open_torchrl(source, options)
    if frames.is_table_of_datasets(source):
        return frames.open_datasets(source, options.named)
    if frames.is_frame(source):
        return frames.open_frame(source, options.named)
    if isinstance(source, Mapping):
        return Columns("arrays", arrays.flatten(source))
    if d3rlpy.is_d3rlpy_buffer(source):
        return d3rlpy.open_d3rlpy_buffer(source)
    raise DatasetError(
        f"source: {name} cannot be read; expected a Minari or OGBench id, a path, a dict of "
        "arrays, a TensorDict, a TorchRL or d3rlpy buffer, a datasets.Dataset, or a DataFrame."
    )
