"""``Source``, which every reader of offline data returns, and the joining of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from iql_torchrl.data.schema import DatasetError, Key

__all__ = ["Piece", "ReadOptions", "Source", "chain", "first_episodes"]

#: Consecutive rows, one array per key; any number of rows, at least 1.
Piece: TypeAlias = dict[Key, NDArray[Any]]


@dataclass(frozen=True)
class ReadOptions:
    """How a source is to be read; see ``load_dataset`` for the meaning of each."""

    columns: dict[str, str | None] = field(default_factory=dict)
    reward_offset: int = 0
    limit: int | None = None
    max_episode_steps: int | None = None
    dtype: torch.dtype = torch.float32
    download: bool = True
    observation_space: gym.Space[Any] | None = None
    action_space: gym.Space[Any] | None = None


@dataclass
class Source:
    """A readable table of transitions.

    ``pieces()`` starts a new pass over all rows in order; each piece has ``observation``
    leaves, ``action``, their ``next`` side, raw ``("next", "reward")``, ``("next", "terminated")``,
    ``("next", "truncated")`` (all ``(rows,)``), and the masks or log-probabilities announced by
    ``masked`` and ``log_prob``. ``episode_lengths`` adds up to the number of rows.
    ``ends_known``: the source marks truncation itself. ``terminates_inside``: rows may terminate
    inside an episode, which continues. ``termination``: a table's column that marks terminations.
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
    termination: str | None = None
    env_spec: EnvSpec | None = None
    reference_scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return int(self.episode_lengths.sum())


def first_episodes(lengths: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """Lengths of the first episodes that fit completely into ``limit`` rows.

    A first episode longer than the limit is cut to ``limit`` rows.
    """
    if limit is None:
        return lengths
    if limit < 1:
        raise DatasetError(f"limit: expected at least 1 transition, got {limit}")
    fitting = int(np.searchsorted(np.cumsum(lengths), limit, side="right"))
    if fitting == 0:
        return np.minimum(lengths[:1], limit)
    return lengths[:fitting]


def _limited(source: Source, limit: int | None) -> Source:
    lengths = first_episodes(source.episode_lengths, limit)
    if int(lengths.sum()) == source.rows:
        return source
    rows, read_pieces = int(lengths.sum()), source.pieces

    def pieces() -> Iterator[Piece]:
        remaining = rows
        for piece in read_pieces():
            size = len(piece[("action",)])
            yield piece if size <= remaining else {k: v[:remaining] for k, v in piece.items()}
            remaining -= size
            if remaining <= 0:
                return

    note = f"limit: kept {rows} of {source.rows} transitions, {len(lengths)} episodes."
    cut = len(lengths) == 1 and lengths[0] < source.episode_lengths[0]
    return replace(
        source,
        episode_lengths=lengths,
        pieces=pieces,
        notes=(*source.notes, note),
        ends_known=source.ends_known and not cut,
    )


def chain(sources: Sequence[Source], limit: int | None = None) -> Source:
    """One source after another as one table; ``limit`` as in ``first_episodes``.

    Raises ``DatasetError`` naming the source and the space that differs from the first one's.
    """
    if not sources:
        raise DatasetError("source: an empty list; name at least one dataset.")
    first = sources[0]
    if len(sources) == 1:
        return _limited(first, limit)
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
    joined = Source(
        name=" + ".join(s.name for s in sources),
        observation_space=first.observation_space,
        action_space=first.action_space,
        episode_lengths=np.concatenate([s.episode_lengths for s in sources]),
        pieces=pieces,
        masked=first.masked,
        log_prob=first.log_prob,
        ends_known=all(s.ends_known for s in sources),
        terminates_inside=any(s.terminates_inside for s in sources),
        termination=first.termination,
        env_spec=first.env_spec if same_env else None,
        reference_scores=first.reference_scores if same_scores else None,
        notes=tuple(notes),
        warnings=tuple(f"{s.name}: {w}" for s in sources for w in s.warnings),
    )
    return _limited(joined, limit)
