"""``Source``, which every reader returns: one after another, cut to a limit, or with joined leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
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
from iql_torchrl.data.readers.environments import EnvLike, env_maker
from iql_torchrl.data.scaling import reward_map
from iql_torchrl.data.schema import ACTION, DatasetError, Key, Layout

#: Consecutive rows, one array per key; any number of rows, at least 1.
Piece: TypeAlias = dict[Key, NDArray[Any]]
#: Keys that ``columns`` may map to a list of columns of one number each.
JOINED = ("observation", "next_observation", "action")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a source is read and built: the options of ``load_dataset``, which describes each.

    Raises ``DatasetError`` naming an option of another kind or out of its range.
    """

    env: EnvLike | None = None
    reward: str | tuple[float, float] = "raw"
    columns: Mapping[str, str | Sequence[str] | None] = field(default_factory=dict)
    reward_offset: int = 0
    concatenate: Sequence[str] | None = None
    limit: int | None = None
    dtype: torch.dtype = torch.float32
    clip_actions: bool = False
    max_episode_steps: int | None = None
    observation_space: gym.Space[Any] | None = None
    action_space: gym.Space[Any] | None = None
    download: bool = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.columns is None:
            object.__setattr__(self, "columns", {})
        if not isinstance(self.columns, Mapping):
            raise DatasetError(
                "columns: expected a dict from our keys to the file's columns, such as "
                f"{{'reward': 'r'}}, got {self.columns!r}."
            )
        for key, name in self.columns.items():
            several = isinstance(name, list | tuple) and name and all(type(n) is str for n in name)
            if not (isinstance(name, str | None) or (several and key in JOINED)):
                raise DatasetError(
                    f"columns maps {key} to {name!r}; expected the name of one column, or None"
                    f"{', or a list of names' if key in JOINED else ''}. Name several columns "
                    f"{key}.0, {key}.1, ... in the file, or pass a dict of arrays."
                )
        for key in ("limit", "max_episode_steps"):
            number = getattr(self, key)
            if number is not None and (not isinstance(number, Integral) or number < 1):
                raise DatasetError(
                    f"{key}: expected a whole number, at least 1, or None, got {number!r}"
                )
        for key in ("observation_space", "action_space"):
            if not isinstance(space := getattr(self, key), gym.Space | None):
                raise DatasetError(
                    f"{key}: expected a gymnasium.Space, got {type(space).__name__}."
                )
        if self.dtype not in (torch.float32, torch.float64):
            raise DatasetError(f"dtype: expected torch.float32 or torch.float64, got {self.dtype}")
        reward_map(self.reward, np.arange(2.0))
        if self.env is not None:
            env_maker(self.env)

    @property
    def named(self) -> dict[str, str | None]:
        """``columns``, with one name for each list of names: the names with commas."""
        return {
            key: name if isinstance(name, str | None) else ", ".join(name)
            for key, name in self.columns.items()
        }

    def described(self) -> ReadOptions:
        """With the environment's spaces and step limit where they are not set."""
        if self.env is None:
            return self
        env = env_maker(self.env)()
        env.close()
        steps = env.spec.max_episode_steps if env.spec is not None else None
        return replace(
            self,
            observation_space=self.observation_space or env.observation_space,
            action_space=self.action_space or env.action_space,
            max_episode_steps=self.max_episode_steps or steps,
        )


@dataclass
class Source:
    """A readable table of transitions.

    ``pieces()`` starts a new pass over all rows in order; each piece has ``observation``
    leaves, ``action``, their ``next`` side, raw ``("next", "reward")``, ``("next", "terminated")``,
    ``("next", "truncated")`` (all ``(rows,)``), and the masks or log-probabilities announced by
    ``masked`` and ``log_prob``. ``episode_lengths`` adds up to the number of rows.
    ``ends_known``: the source marks truncation itself. ``terminates_inside``: rows may terminate
    inside an episode, which continues. ``paths``: a table's columns by our names.
    """

    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    episode_lengths: NDArray[np.int64]
    pieces: Callable[[], Iterator[Piece]]
    masked: bool = False
    log_prob: bool = False
    ends_known: bool = True
    terminates_inside: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)
    env_spec: EnvSpec | None = None
    adaptation: Adaptation = UNCHANGED
    reference_scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return int(self.episode_lengths.sum())

    def layout(self, dtype: torch.dtype) -> Layout:
        """Of the table that is built of it."""
        return transition_layout(
            self.observation_space, self.action_space,
            dtype=dtype, masked=self.masked, log_prob=self.log_prob,
        )  # fmt: skip


def chain(sources: Sequence[Source]) -> Source:
    """One source after another as one table. ``DatasetError`` names a space that differs."""
    if not sources:
        raise DatasetError("source: an empty list; name at least one dataset.")
    first = sources[0]
    if len(sources) == 1:
        return first
    for source in sources[1:]:
        for part in ("observation_space", "action_space", "masked", "log_prob"):
            expected, actual = getattr(first, part), getattr(source, part)
            if expected != actual:
                raise DatasetError(
                    f"{source.name}: {part} is {actual}, but {first.name} has {expected}; "
                    "only datasets of the same spaces can be joined."
                )

    def pieces() -> Iterator[Piece]:
        for source in sources:
            yield from source.pieces()

    notes = [f"{s.name}: {note}" for s in sources for note in s.notes]
    same_env = all(s.env_spec == first.env_spec for s in sources)
    same_scores = all(s.reference_scores == first.reference_scores for s in sources)
    if not same_env:
        notes.append("the joined datasets name different environments; none is used.")
    return replace(
        first,
        name=" + ".join(s.name for s in sources),
        episode_lengths=np.concatenate([s.episode_lengths for s in sources]),
        pieces=pieces,
        ends_known=all(s.ends_known for s in sources),
        terminates_inside=any(s.terminates_inside for s in sources),
        env_spec=first.env_spec if same_env else None,
        reference_scores=first.reference_scores if same_scores else None,
        notes=tuple(notes),
        warnings=tuple(f"{s.name}: {w}" for s in sources for w in s.warnings),
    )


def limited(source: Source, limit: int | None) -> Source:
    """At most ``limit`` rows: the first complete episodes, or a part of a longer first one."""
    if limit is None or source.rows <= limit:
        return source
    complete = int(np.searchsorted(np.cumsum(source.episode_lengths), limit, side="right"))
    lengths = source.episode_lengths[:complete] if complete else np.array([limit], np.int64)
    rows = int(lengths.sum())

    def pieces() -> Iterator[Piece]:
        remaining = rows
        for piece in source.pieces():
            size = len(piece[ACTION])
            yield piece if size <= remaining else {k: v[:remaining] for k, v in piece.items()}
            remaining -= size
            if remaining <= 0:
                return

    note = f"limit: kept {rows} of {source.rows} transitions, {len(lengths)} episodes."
    return replace(
        source,
        episode_lengths=lengths,
        pieces=pieces,
        notes=(*source.notes, note),
        ends_known=source.ends_known and complete > 0,
    )


def concatenated(source: Source, names: Sequence[str]) -> Source:
    """The named leaves of a Dict observation joined, in that order, into one flat observation.

    ``DatasetError`` for a plain observation, an unknown name, or leaves that are not Boxes of floats.
    """
    adaptation = replace(source.adaptation, concatenate=tuple(names))
    parts = joined_leaves(leaf_spaces(source.observation_space, ()), names, source.name)

    def pieces() -> Iterator[Piece]:
        for piece in source.pieces():
            joined = {key: values for key, values in piece.items() if "observation" not in key}
            for side in ((), ("next",)):
                leaves = [piece[(*side, "observation", *key)] for key in parts]
                joined[(*side, "observation")] = join(leaves, rows=True)
            yield joined

    space = gym.spaces.flatten_space(gym.spaces.Tuple(parts.values()))
    return replace(source, observation_space=space, pieces=pieces, adaptation=adaptation)
