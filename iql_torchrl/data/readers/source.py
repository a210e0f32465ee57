"""``open_source``: from what a user passes to columns, their episodes, and the spaces of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from iql_torchrl.data.codec import (
    UNCHANGED,
    Adaptation,
    joined_leaves,
    leaf_spaces,
    transition_layout,
)
from iql_torchrl.data.readers.arrays import Columns, side_by_side
from iql_torchrl.data.readers.boundaries import Episodes, find_episodes
from iql_torchrl.data.readers.columns import name_columns, number_texts
from iql_torchrl.data.readers.guess import guess_action_space, guess_observation_space
from iql_torchrl.data.readers.opening import open_columns
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError, Layout


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything about a source that is known before its transitions are read.

    ``parts``: the named columns and the episodes of each joined dataset, in their order. ``layout``:
    the entries of transitions. ``guessed``: ``"observation"`` and ``"action"`` where the space was made
    from the data.
    """

    name: str
    parts: Sequence[tuple[Columns, Episodes]]
    episode_lengths: NDArray[np.int64]
    layout: Layout
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    guessed: frozenset[str] = frozenset()
    adaptation: Adaptation = UNCHANGED
    env_spec: EnvSpec | None = None
    reference_scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def open_source(source: Any, options: ReadOptions) -> Source:
    """What ``load_dataset`` reads, with joined leaves and at most ``limit`` transitions.

    A list or tuple is joined: spaces that a source or ``options`` declare must be equal, spaces that
    are made from the data hold all of them.
    """
    items = list(_items(source)) if isinstance(source, list | tuple) else [source]
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
        if left is not None:
            episodes = episodes.limited(left)
            left -= len(episodes.rows)
        parts.append((ordered, episodes))
        if left == 0:
            break
    return _joined(parts, options)


def _items(source: Any) -> Iterator[Any]:
    """The sources in a list, also of lists."""
    for item in source:
        yield from _items(item) if isinstance(item, list | tuple) else [item]


def _joined(parts: list[tuple[Columns, Episodes]], options: ReadOptions) -> Source:
    columns, first = [each for each, _ in parts], parts[0][0]
    notes, warnings = list[str](), list[str]()
    for each, episodes in parts:
        prefix = f"{each.name}: " if len(parts) > 1 else ""
        notes += [prefix + note for note in (*each.notes, *episodes.notes)]
        warnings += [*each.warnings, *(f"{each.name}: {text}" for text in episodes.warnings)]
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
        parts, observation = _concatenated(parts, observation, options)
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
    parts: list[tuple[Columns, Episodes]], space: gym.Space[Any], options: ReadOptions
) -> tuple[list[tuple[Columns, Episodes]], gym.Space[Any]]:
    """The named leaves of a Dict observation joined, in that order, into one flat observation.

    ``DatasetError`` for a plain observation, an unknown name, or leaves that are not Boxes of floats.
    """
    name = " + ".join(columns.name for columns, _ in parts)
    leaves = joined_leaves(leaf_spaces(space, ()), options.concatenate or (), name)
    joined = []
    for columns, episodes in parts:
        kept = {k: v for k, v in columns.columns.items() if "observation" not in k.split("/")}
        for side in ("observation", "next/observation"):
            paths = ["/".join((side, *key)) for key in leaves]
            if all(path in columns.columns for path in paths):
                kept[side] = side_by_side([columns.columns[path] for path in paths])
        joined.append((replace(columns, columns=kept), episodes))
    return joined, gym.spaces.flatten_space(gym.spaces.Tuple(leaves.values()))
