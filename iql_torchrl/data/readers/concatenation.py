"""Leaves of a Dict observation joined into one flat observation, in data and in environments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.source import Piece, Source
from iql_torchrl.data.schema import DatasetError, Key, leaf_spaces
from iql_torchrl.descriptions import describe_space

__all__ = ["concatenated", "joined_env_maker"]


def concatenated(source: Source, names: Sequence[str]) -> Source:
    """The named leaves of a Dict observation joined, in that order, into one flat observation.

    A nested leaf is named ``"outer/inner"``. Raises ``DatasetError`` for a plain observation, an
    unknown name, or leaves that are not Boxes of floats.
    """
    keys, joined = _joined(source.observation_space, names, source.name)
    read_pieces = source.pieces

    def pieces() -> Iterator[Piece]:
        for piece in read_pieces():
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
        # If the caller's env= joins the leaves itself, its observation is already plain.
        nested = isinstance(env.observation_space, gym.spaces.Dict)
        return _JoinLeaves(env, self.names) if nested else env


def joined_env_maker(
    maker: Callable[[], gym.Env[Any, Any]], names: Sequence[str]
) -> Callable[[], gym.Env[Any, Any]]:
    """``maker`` with the observations of its environments joined as ``concatenated`` joins rows."""
    return _JoinedMaker(maker, tuple(names))
