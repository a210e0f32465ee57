"""``open_source``: from what a user passes to columns, their episodes, and the spaces of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from iql_torchrl.data.codec import (
    UNCHANGED,
    Adaptation,
    join,
    joined_leaves,
    leaf_spaces,
    transition_layout,
)
from iql_torchrl.data.readers.arrays import Column, Columns, ComputedColumn
from iql_torchrl.data.readers.columns import name_columns, number_texts
from iql_torchrl.data.readers.episodes import Episodes, find_episodes
from iql_torchrl.data.readers.guess import Guess, guess_action_space, guess_observation_space
from iql_torchrl.data.readers.opening import open_columns
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError, Layout


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything about a source that is known before its transitions are read.

    ``parts``: the named columns and the episodes of each joined dataset, in their order. ``guessed``:
    ``"observation"`` and ``"action"`` where the space was made from the data.
    """

    name: str
    parts: tuple[tuple[Columns, Episodes], ...]
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    guessed: frozenset[str] = frozenset()
    adaptation: Adaptation = UNCHANGED
    env_spec: EnvSpec | None = None
    reference_scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        return np.concatenate([episodes.lengths for _, episodes in self.parts])

    @property
    def rows(self) -> int:
        """The number of transitions."""
        return sum(len(episodes.rows) for _, episodes in self.parts)

    def layout(self, dtype: Any) -> Layout:
        """The entries of the transitions, with their shapes and dtypes."""
        columns = self.parts[0][0].columns
        return transition_layout(
            self.observation_space, self.action_space, dtype=dtype,
            masked="action_mask" in columns, log_prob="action_log_prob" in columns,
        )  # fmt: skip


def open_source(source: Any, options: ReadOptions) -> Source:
    """What ``load_dataset`` reads, with joined leaves and at most ``limit`` transitions.

    A list or tuple is joined: spaces that a source or ``options`` declare must be equal, spaces that
    are made from the data hold all of them.
    """
    items = list(_items(source))
    if not items:
        raise DatasetError("source: an empty list; name at least one dataset.")
    options = options.described()
    opened = [open_columns(item, options) for item in items]
    named = number_texts([name_columns(columns, options) for columns in opened])
    parts, left = [], options.limit
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
    if isinstance(source, list | tuple):
        for item in source:
            yield from _items(item)
    else:
        yield source


def _joined(parts: list[tuple[Columns, Episodes]], options: ReadOptions) -> Source:
    columns, first = [each for each, _ in parts], parts[0][0]
    for optional in ("action_mask", "action_log_prob"):
        have = [each.name for each in columns if optional in each.columns]
        if have and len(have) < len(columns):
            lacks = next(each.name for each in columns if optional not in each.columns)
            raise DatasetError(
                f"{lacks}: has no {optional}, but {have[0]} has; leave it out with "
                f"columns={{{optional!r}: None}}, or join only datasets that have it."
            )
    observation = _declared(columns, "observation_space", options) or guess_observation_space(
        columns
    )
    action = _declared(columns, "action_space", options) or guess_action_space(columns)
    guesses = {
        key: each
        for key, each in (("observation", observation), ("action", action))
        if isinstance(each, Guess)
    }
    spaces = [each.space if isinstance(each, Guess) else each for each in (observation, action)]
    several = len(parts) > 1
    notes, warnings = [], []
    for each, episodes in parts:
        prefix = f"{each.name}: " if several else ""
        notes += [prefix + note for note in (*each.notes, *episodes.notes)]
        warnings += [*each.warnings, *(f"{each.name}: {text}" for text in episodes.warnings)]
    notes += [note for guess in guesses.values() for note in guess.notes]
    warnings += [f"{first.name}: {guess.warning}" for guess in guesses.values() if guess.warning]
    same_env = all(each.env_spec == first.env_spec for each in columns)
    if not same_env:
        notes.append("the joined datasets name different environments; none is used.")
    same_scores = all(each.reference_scores == first.reference_scores for each in columns)
    joined = Source(
        name=" + ".join(each.name for each in columns),
        parts=tuple(parts),
        observation_space=spaces[0],
        action_space=spaces[1],
        guessed=frozenset(guesses),
        adaptation=first.adaptation,
        env_spec=first.env_spec if same_env else None,
        reference_scores=first.reference_scores if same_scores else None,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    joined = replace(joined, warnings=(*joined.warnings, *_time_limit(joined, options)))
    return concatenated(joined, options.concatenate) if options.concatenate else joined


def _declared(columns: Sequence[Columns], part: str, options: ReadOptions) -> Any:
    """The space that the options or the sources declare; None if neither does."""
    if (space := getattr(options, part)) is not None:
        return space
    given = [(each.name, getattr(each, part)) for each in columns]
    known = [(name, space) for name, space in given if space is not None]
    for name, space in known[1:]:
        if space != known[0][1]:
            raise DatasetError(
                f"{name}: {part} is {space}, but {known[0][0]} has {known[0][1]}; only datasets of the "
                "same spaces can be joined."
            )
    return known[0][1] if known else getattr(options, f"env_{part}")


def _time_limit(source: Source, options: ReadOptions) -> list[str]:
    """A warning where episodes are longer than the environment lets them be."""
    limit = options.env_max_episode_steps
    if limit is None and source.env_spec is not None:
        limit = source.env_spec.max_episode_steps
    longest = int(source.episode_lengths.max())
    if limit is None or longest <= limit:
        return []
    return [
        f"{source.name}: episodes have up to {longest} steps, but the environment ends them after "
        f"{limit}: returns of evaluations are of shorter episodes. Pass env= with the limit that the "
        f"data were recorded with: env=lambda: gymnasium.make(..., max_episode_steps={longest})."
    ]


def concatenated(source: Source, names: Sequence[str]) -> Source:
    """The named leaves of a Dict observation joined, in that order, into one flat observation.

    ``DatasetError`` for a plain observation, an unknown name, or leaves that are not Boxes of floats.
    """
    parts = joined_leaves(leaf_spaces(source.observation_space, ()), names, source.name)
    paths = ["/".join(("observation", *key)) for key in parts]

    def joined(columns: Columns) -> Columns:
        kept = {k: v for k, v in columns.columns.items() if "observation" not in k.split("/")}
        for side in ("", "next/"):
            found = [columns.columns.get(f"{side}{path}") for path in paths]
            if all(each is not None for each in found):
                kept[f"{side}observation"] = _flat([each for each in found if each is not None])
        return replace(columns, columns=kept)

    return replace(
        source,
        observation_space=gym.spaces.flatten_space(gym.spaces.Tuple(parts.values())),
        parts=tuple((joined(columns), episodes) for columns, episodes in source.parts),
        adaptation=replace(source.adaptation, concatenate=tuple(names)),
    )


def _flat(columns: list[Column]) -> Column:
    def read(rows: slice) -> NDArray[Any]:
        return join([np.asarray(column[rows]) for column in columns], rows=True)

    width = sum(int(np.prod(column.shape[1:])) for column in columns)
    kind = np.result_type(*(np.dtype(column.dtype) for column in columns))
    return ComputedColumn((columns[0].shape[0], width), kind, read)
