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

from iql_torchrl.data.schema import DatasetError, Key, leaf_spaces
from iql_torchrl.descriptions import describe_space

__all__ = [
    "EnvLike",
    "Piece",
    "ReadOptions",
    "Source",
    "chain",
    "concatenated",
    "env_maker",
    "first_episodes",
    "joined_env_maker",
]

#: Consecutive rows, one array per key; any number of rows, at least 1.
Piece: TypeAlias = dict[Key, NDArray[Any]]
EnvLike: TypeAlias = "str | EnvSpec | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]]"


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
    ``ends_known``: the source marks truncation itself. ``goes_on``: rows may terminate inside an
    episode, which continues. ``termination``: a table's column that marks terminations.
    """

    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    episode_lengths: NDArray[np.int64]
    pieces: Callable[[], Iterator[Piece]]
    masked: bool = False
    log_prob: bool = False
    ends_known: bool = True
    goes_on: bool = False
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
    rows, read = int(lengths.sum()), source.pieces

    def pieces() -> Iterator[Piece]:
        left = rows
        for piece in read():
            size = len(piece[("action",)])
            yield piece if size <= left else {k: v[:left] for k, v in piece.items()}
            left -= size
            if left <= 0:
                return

    kept = f"limit: kept {rows} of {source.rows} transitions, {len(lengths)} episodes."
    cut = len(lengths) == 1 and lengths[0] < source.episode_lengths[0]
    return replace(
        source,
        episode_lengths=lengths,
        pieces=pieces,
        notes=(*source.notes, kept),
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
    for other in sources[1:]:
        for part in ("observation_space", "action_space", "masked", "log_prob"):
            ours, theirs = getattr(first, part), getattr(other, part)
            if ours != theirs:
                raise DatasetError(
                    f"{other.name}: {part} is {theirs}, but {first.name} has {ours}; "
                    "only datasets of the same spaces can be joined."
                )

    def pieces() -> Iterator[Piece]:
        for source in sources:
            yield from source.pieces()

    notes = [f"{s.name}: {note}" for s in sources for note in s.notes]
    same_env = all(s.env_spec == first.env_spec for s in sources)
    same_scores = all(s.reference_scores == first.reference_scores for s in sources)
    if not same_env:
        notes.append("the joined datasets name different environments; none was kept.")
    joined = Source(
        name=" + ".join(s.name for s in sources),
        observation_space=first.observation_space,
        action_space=first.action_space,
        episode_lengths=np.concatenate([s.episode_lengths for s in sources]),
        pieces=pieces,
        masked=first.masked,
        log_prob=first.log_prob,
        ends_known=all(s.ends_known for s in sources),
        goes_on=any(s.goes_on for s in sources),
        termination=first.termination,
        env_spec=first.env_spec if same_env else None,
        reference_scores=first.reference_scores if same_scores else None,
        notes=tuple(notes),
        warnings=tuple(f"{s.name}: {w}" for s in sources for w in s.warnings),
    )
    return _limited(joined, limit)


def env_maker(env: EnvLike) -> Callable[[], gym.Env[Any, Any]]:
    """A function that makes a fresh environment from an id, a spec, an instance or a function.

    The function raises ``DatasetError`` saying what to install where the environment is missing.
    """
    if isinstance(env, gym.Env):
        if env.spec is None:
            raise DatasetError(
                f"env: {type(env).__name__} has no spec to make a fresh one from; pass a function."
            )
        env = env.spec
    if isinstance(env, str | EnvSpec):
        return _SpecMaker(env)
    if not callable(env):
        raise DatasetError(
            f"env: expected an id, an EnvSpec, an environment or a function, got {type(env).__name__}"
        )
    return env


@dataclass(frozen=True)
class _SpecMaker:
    spec: str | EnvSpec

    def __call__(self) -> gym.Env[Any, Any]:
        try:
            return gym.make(self.spec)
        except (gym.error.Error, ImportError, AttributeError) as error:
            name = self.spec if isinstance(self.spec, str) else self.spec.id
            raise DatasetError(
                f"environment {name!r} cannot be made ({_one_line(error)}); {_advice(name)}"
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _advice(name: str) -> str:
    """What to install, from the environment's own registration where it has one."""
    spec = gym.registry.get(name)
    entry = str(spec.entry_point) if spec is not None else ""
    for folder, extra in (
        ("mujoco", "mujoco"),
        ("box2d", "box2d"),
        ("toy_text", "toy-text"),
        ("classic_control", "classic-control"),
    ):
        if f"envs.{folder}" in entry:
            return f'install it with: pip install "gymnasium[{extra}]"'
    return (
        "install the package that registers it and import it first (AntMaze, Adroit and Kitchen: "
        'pip install "gymnasium-robotics"), or pass env=.'
    )


def concatenated(source: Source, names: Sequence[str]) -> Source:
    """The named leaves of a Dict observation joined, in that order, into one flat observation.

    A nested leaf is named ``"outer/inner"``. Raises ``DatasetError`` for a plain observation, an
    unknown name, or leaves that are not Boxes of floats.
    """
    keys, joined = _joined(source.observation_space, names, source.name)
    read = source.pieces

    def pieces() -> Iterator[Piece]:
        for piece in read():
            out = {k: v for k, v in piece.items() if "observation" not in k}
            for side in ((), ("next",)):
                parts = [piece[(*side, *key)] for key in keys]
                flat = [part.reshape(len(part), -1) for part in parts]
                out[(*side, "observation")] = np.concatenate(flat, axis=1)
            yield out

    return replace(source, observation_space=joined, pieces=pieces)


def _joined(
    space: gym.Space[Any], names: Sequence[str], owner: str
) -> tuple[list[Key], gym.spaces.Box]:
    """Keys of the leaves ``names`` of a Dict space, and the flat Box they make together."""
    if not isinstance(space, gym.spaces.Dict):
        raise DatasetError(
            f"{owner}: concatenate={list(names)}, but the observation is {describe_space(space)}, "
            "not a Dict; leave concatenate out."
        )
    leaves = leaf_spaces(space)
    keys = [("observation", *name.split("/")) for name in names]
    boxes = []
    for key in keys:
        leaf = leaves.get(key)
        if leaf is None:
            known = ", ".join("/".join(k[1:]) for k in leaves)
            raise DatasetError(
                f"{owner}: concatenate names {'/'.join(key[1:])!r}; the leaves are {known}."
            )
        if not isinstance(leaf, gym.spaces.Box) or np.dtype(leaf.dtype).kind != "f":
            raise DatasetError(
                f"{owner}: concatenate joins only Boxes of floats, but {'/'.join(key[1:])!r} is {leaf}."
            )
        boxes.append(leaf)
    joined = gym.spaces.Box(
        np.concatenate([b.low.ravel() for b in boxes]),
        np.concatenate([b.high.ravel() for b in boxes]),
        dtype=np.result_type(*(b.dtype for b in boxes)).type,
    )
    return keys, joined


class _JoinLeaves(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    def __init__(self, env: gym.Env[Any, Any], names: Sequence[str]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, names=names)
        super().__init__(env)
        owner = type(env.unwrapped).__name__ if env.spec is None else env.spec.id
        self._keys, self.observation_space = _joined(env.observation_space, names, owner)

    def observation(self, observation: Any) -> NDArray[Any]:
        parts = []
        for key in self._keys:
            leaf = observation
            for name in key[1:]:
                leaf = leaf[name]
            parts.append(np.ravel(leaf))
        return np.concatenate(parts, dtype=self.observation_space.dtype)


@dataclass(frozen=True)
class _JoinedMaker:
    maker: Callable[[], gym.Env[Any, Any]]
    names: tuple[str, ...]

    def __call__(self) -> gym.Env[Any, Any]:
        env = self.maker()
        # An env= that the caller joined already gives a plain observation: nothing is left to do.
        nested = isinstance(env.observation_space, gym.spaces.Dict)
        return _JoinLeaves(env, self.names) if nested else env


def joined_env_maker(
    maker: Callable[[], gym.Env[Any, Any]], names: Sequence[str]
) -> Callable[[], gym.Env[Any, Any]]:
    """``maker`` with the observations of its environments joined as ``concatenated`` joins rows."""
    return _JoinedMaker(maker, tuple(names))
