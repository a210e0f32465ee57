"""Gymnasium spaces as stored leaves: layouts, specs, and environments adapted to a dataset.

A leaf is a space without others inside, and has a key: ``("observation", "arm", "speed")``. A Tuple
is a Dict with the names ``"0"``, ``"1"``, ... Categories are stored counted from zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded

from iql_torchrl.data.schema import (
    ACTION,
    DONE,
    EPISODE,
    LOG_PROB,
    MASK,
    NEXT_MASK,
    REWARD,
    TERMINATED,
    TRUNCATED,
    DatasetError,
    Field,
    Key,
    Layout,
    dotted,
    nested,
)
from iql_torchrl.descriptions import describe_space

#: Spaces of categories; with Box, all that have a tensor form.
CATEGORIES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def leaf_spaces(space: gym.Space[Any], prefix: Key = ("observation",)) -> dict[Key, gym.Space[Any]]:
    """The leaves of a space by key; a space without others inside is a single leaf."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return {prefix: space}
    leaves: dict[Key, gym.Space[Any]] = {}
    for name, child in _children(space):
        leaves.update(leaf_spaces(child, (*prefix, name)))
    return leaves


def _children(space: Any) -> list[tuple[str, gym.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return [(str(n), child) for n, child in enumerate(space.spaces)]


def has_tensor_form(space: gym.Space[Any]) -> bool:
    """True if values of a leaf can be stored: not texts, graphs or sequences."""
    return isinstance(space, (spaces.Box, *CATEGORIES))


def field_of_space(space: gym.Space[Any], dtype: torch.dtype, key: Key) -> Field:
    """How values of a space are stored; raises as :func:`spec_of_space`."""
    spec = spec_of_space(space, dtype, key)
    return Field(tuple(spec.shape), spec.dtype)


def spec_of_space(space: gym.Space[Any], dtype: torch.dtype, key: Key) -> TensorSpec:
    """A leaf's TorchRL spec: categorical, Bounded, or Unbounded where any bound is infinite.

    Floats are stored as ``dtype``, categories as int64; a Box of integers keeps its dtype (images stay
    uint8). TorchRL cannot sample a spec with one infinite bound, so the spec of such a space lacks its
    finite bounds too. Raises ``DatasetError`` for a space without a tensor form.
    """
    shape = torch.Size(space.shape or ())
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), shape=shape, dtype=torch.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategorical(torch.as_tensor(space.nvec), shape=shape, remove_singleton=False)
    if isinstance(space, spaces.MultiBinary):
        return Bounded(0, 1, shape=shape, dtype=torch.int64)
    if not isinstance(space, spaces.Box):
        raise DatasetError(
            f"{dotted(key)}: a {type(space).__name__} space has no tensor form; expected Box, "
            "Discrete, MultiDiscrete, MultiBinary, or a Dict of them."
        )
    floats = np.issubdtype(space.dtype, np.floating)
    stored = dtype if floats else torch.from_numpy(np.empty(0, space.dtype)).dtype
    if not space.is_bounded():
        return Unbounded(shape=shape, dtype=stored)
    low, high = (torch.as_tensor(bound).to(stored) for bound in (space.low, space.high))
    return Bounded(low, high, shape=shape, dtype=stored)


def observation_spec_of(space: gym.Space[Any], dtype: torch.dtype) -> Composite:
    """``Composite(observation=...)``, nested below ``observation`` for a Dict space."""
    spec = Composite()
    for key, leaf in leaf_spaces(space).items():
        spec[key] = spec_of_space(leaf, dtype, key)
    return spec


def transition_layout(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    log_prob: bool = False,
) -> Layout:
    """Every key of a transition with its shape and dtype.

    ``masked`` adds ``action_mask`` and ``("next", "action_mask")`` (Discrete actions only),
    ``log_prob`` the behaviour policy's log-probability of the logged action.
    """
    layout: Layout = {}
    for key, space in leaf_spaces(observation_space).items():
        layout[key] = field_of_space(space, dtype, key)
    layout[ACTION] = field_of_space(action_space, dtype, ACTION)
    layout.update({("next", *k): f for k, f in layout.items() if k[0] == "observation"})
    layout[REWARD] = Field((1,), dtype)
    layout.update({k: Field((1,), torch.bool) for k in (TERMINATED, TRUNCATED, DONE)})
    layout[EPISODE] = Field((), torch.int64)
    if masked:
        if not isinstance(action_space, spaces.Discrete):
            raise DatasetError(
                f"action_mask: the actions are {describe_space(action_space)}; a mask needs Discrete "
                "actions."
            )
        layout[MASK] = layout[NEXT_MASK] = Field((int(action_space.n),), torch.bool)
    if log_prob:
        layout[LOG_PROB] = Field((), dtype)
    return layout


def leaf_of(values: Any, path: Sequence[str]) -> Any:
    """The leaf at ``path`` of one observation or of rows: in dicts, and by position in tuples."""
    for name in path:
        values = values[int(name)] if isinstance(values, tuple) else values[name]
    return values


def join(leaves: Sequence[Any], *, rows: bool = False) -> NDArray[Any]:
    """Leaves side by side in one vector ``(F,)``, or with ``rows`` of each row, ``(N, F)``."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    return np.concatenate([a.reshape(len(a), -1) if rows else a.ravel() for a in arrays], axis=-1)


def action_leaves(space: gym.Space[Any]) -> dict[Key, gym.Space[Any]]:
    """The leaves of an action space by their path, in an order that depends on the paths alone."""
    leaves = leaf_spaces(space, ())
    return {path: leaves[path] for path in sorted(leaves)}


def flat_action_space(space: gym.Space[Any], name: str) -> gym.Space[Any]:
    """The space of actions of the dataset ``name`` that are one vector ``(A,)``.

    Of a Box, or of Boxes in a Dict or Tuple: a Box. Of Discrete and MultiDiscrete in a Dict or
    Tuple: a MultiDiscrete; of one Discrete alone: that. Raises ``DatasetError`` for another space.
    """
    leaves: list[Any] = list(action_leaves(space).values())
    if all(isinstance(leaf, spaces.Box) for leaf in leaves):
        flat: gym.Space[Any] = spaces.flatten_space(spaces.Tuple(leaves))
        return flat
    if leaves == [space]:
        raise DatasetError(
            f"{name}: the actions are {describe_space(space)}; flatten_actions is for a Box."
        )
    if not all(isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete) for leaf in leaves):
        listed = ", ".join(
            f"{'/'.join(path)} ({describe_space(leaf)})"
            for path, leaf in action_leaves(space).items()
        )
        raise DatasetError(
            f"{name}: the actions have the leaves {listed}; expected only Boxes, or only Discrete and "
            "MultiDiscrete, because a policy has actions of one kind. Pass a dict of arrays whose "
            "action is one Box or one Discrete, and as env= the environment with such actions "
            "(gymnasium.wrappers.TransformAction)."
        )
    if len(leaves) == 1 and isinstance(leaves[0], spaces.Discrete):
        return leaves[0]
    counts = [leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec for leaf in leaves]
    return spaces.MultiDiscrete(join(counts), start=join([leaf.start for leaf in leaves]))


def unflat_action(action: Any, space: gym.Space[Any]) -> Any:
    """An action of ``space`` from one of its ``flat_action_space``."""
    leaves = action_leaves(space)
    sizes = [int(np.prod(leaf.shape or ())) for leaf in leaves.values()]
    parts = np.split(np.ravel(action), np.cumsum(sizes)[:-1])
    return _filled(space, dict(zip(leaves, parts, strict=True)))


def _filled(space: gym.Space[Any], parts: Mapping[Key, NDArray[Any]], path: Key = ()) -> Any:
    """A value of ``space`` with ``parts`` as its leaves, ``space`` being at ``path``."""
    if path in parts:
        values = np.asarray(parts[path], space.dtype).reshape(space.shape or ())
        return values[()] if isinstance(space, spaces.Discrete) else values
    inner = {name: _filled(each, parts, (*path, name)) for name, each in _children(space)}
    return tuple(inner.values()) if isinstance(space, spaces.Tuple) else inner


@dataclass(frozen=True)
class Adaptation:
    """How observations and actions of an environment become those of a dataset.

    ``leaves``: the leaves of a Dict or Tuple observation that are kept, such as ``"arm/speed"``; empty
    keeps the observation as it is, and a single leaf becomes a plain observation. ``concatenate``:
    leaves that are joined, in this order, into one vector. ``mask``: the leaf that is the mask of
    allowed actions; environments give it as ``info["action_mask"]``. ``flat_action``: actions have
    the ``flat_action_space``. Its ``vars`` are JSON, from which ``Adaptation(**vars)`` is made again.
    """

    leaves: tuple[str, ...] = ()
    concatenate: tuple[str, ...] = ()
    mask: str = ""
    flat_action: bool = False

    def __post_init__(self) -> None:
        for name in ("leaves", "concatenate"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def sources(self, space: gym.Space[Any], owner: str) -> dict[Key, Key]:
        """The path in ``space`` of each kept leaf, by its key after ``observation``.

        A space without leaves is kept as it is. Raises ``DatasetError`` where the space, which is
        that of ``owner``, lacks a leaf.
        """
        paths = list(leaf_spaces(space, ()))
        if not self.leaves or paths == [()]:
            return {path: path for path in paths}
        chosen = [tuple(name.split("/")) for name in self.leaves]
        if missing := ["/".join(path) for path in chosen if path not in paths]:
            raise DatasetError(
                f"{owner}: the observation has the leaves {', '.join(map('/'.join, paths))}, but not "
                f"{missing[0]!r}, which the dataset has; pass the env that the data came from."
            )
        return {(): chosen[0]} if len(chosen) == 1 else {path: path for path in chosen}

    def observation_space(self, space: gym.Space[Any], owner: str) -> gym.Space[Any]:
        """The space of adapted observations. ``DatasetError`` names a leaf that cannot be adapted."""
        leaves = leaf_spaces(space, ())
        kept = {key: leaves[path] for key, path in self.sources(space, owner).items()}
        if self.concatenate:
            parts = joined_leaves(kept, self.concatenate, owner)
            return spaces.flatten_space(spaces.Tuple(parts.values()))
        adapted: gym.Space[Any] = nested(kept, lambda inner: spaces.Dict(list(inner.items())))
        return adapted


UNCHANGED = Adaptation()


def joined_leaves(
    leaves: Mapping[Key, gym.Space[Any]], names: Sequence[str], owner: str
) -> dict[Key, gym.Space[Any]]:
    """The leaves that ``names`` lists, in its order, each a Box of floats; else ``DatasetError``."""
    if () in leaves:
        raise DatasetError(
            f"{owner}: concatenate={list(names)}, but the observation is "
            f"{describe_space(leaves[()])}, not a Dict; leave concatenate out."
        )
    for name in names:
        if (leaf := leaves.get(tuple(name.split("/")))) is None:
            known = ", ".join(map("/".join, leaves))
            raise DatasetError(f"{owner}: concatenate names {name!r}; the leaves are {known}.")
        if not isinstance(leaf, spaces.Box) or np.dtype(leaf.dtype).kind != "f":
            raise DatasetError(
                f"{owner}: concatenate joins only Boxes of floats, but {name!r} is {leaf}. Integers of "
                "a table that are not categories: name the columns in a list, "
                "columns={'observation': [...]}."
            )
    return {key: leaves[key] for key in (tuple(name.split("/")) for name in names)}
