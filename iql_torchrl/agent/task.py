"""The description of the data that networks need; small enough to be saved with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor
from torchrl.data import Composite, TensorSpec

from iql_torchrl.data import DatasetSummary, ObservationStatistics, RewardMap
from iql_torchrl.data.codec import observation_spec_of, spec_of_space
from iql_torchrl.data.schema import ACTION, Key

# by type of space, the attributes that make an equal one; a Dict has its spaces by name
ATTRIBUTES = {
    "Box": ("low", "high", "dtype"),
    "Discrete": ("n", "start", "dtype"),
    "MultiDiscrete": ("nvec", "start", "dtype"),
    "MultiBinary": ("n",),
}


@dataclass(frozen=True, eq=False)
class Task:
    """Observations and actions as the environment has them, and the dataset's statistics.

    Attributes:
        observation_space, action_space: Gymnasium's.
        statistics: per observation key, as ``OfflineDataset`` has them; not of categories and images.
        masked: whether each observation has a bool ``action_mask`` ``(n,)``.
        dtype: torch.float32 or torch.float64, of observations and continuous actions.
        name: of the data, for display.
        reference_scores: raw returns (random, expert), or None.
        reward_map: the reward scaling of the dataset, in whose units the critics' values are; None
            where unknown.
        episodes: digests of some of the dataset's episodes (``data.digests``). With them an
            estimate of this agent's value recognises episodes that it was trained on. None where
            unknown.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    statistics: Mapping[str | Key, ObservationStatistics] = field(default_factory=dict)
    masked: bool = False
    dtype: torch.dtype = torch.float32
    name: str = "task"
    reference_scores: tuple[float, float] | None = None
    reward_map: RewardMap | None = None
    episodes: NDArray[np.int64] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, dataset: DatasetSummary) -> Task:
        """The task of ``dataset``; ``TypeError`` on anything but a dataset."""
        if not isinstance(dataset, DatasetSummary):
            raise TypeError(
                f"dataset is {type(dataset).__name__}; expected what load_dataset(...) returns."
            )
        names = {each.name for each in fields(cls)} - {"episodes"}
        return cls(**{name: getattr(dataset, name) for name in names}, episodes=dataset.sketch())

    @property
    def observation_spec(self) -> Composite:
        """``Composite`` with the key ``observation``, nested below it for Dict spaces."""
        return observation_spec_of(self.observation_space, self.dtype)

    @property
    def action_spec(self) -> TensorSpec:
        """Bounded for Box; Categorical for Discrete, where the policy's indices count from zero."""
        return spec_of_space(self.action_space, self.dtype, ACTION)

    def state_dict(self) -> dict[str, Any]:
        """Only numbers, strings, lists, dicts and tensors: readable with ``weights_only=True``."""
        statistics = [
            {
                "key": key if isinstance(key, str) else list(key),
                "mean": each.mean.detach().cpu().clone(),  # a view is saved with all of its memory
                "std": each.std.detach().cpu().clone(),
                "constant": list(each.constant),
                "count": int(each.count),
            }
            for key, each in self.statistics.items()
        ]
        scores, episodes, change = self.reference_scores, self.episodes, self.reward_map
        return {
            **vars(self),
            "observation_space": space_state(self.observation_space),
            "action_space": space_state(self.action_space),
            "statistics": statistics,
            "dtype": str(self.dtype).removeprefix("torch."),
            "reference_scores": None if scores is None else [float(score) for score in scores],
            "reward_map": None if change is None else [change.scale, change.shift],
            "episodes": None if episodes is None else torch.from_numpy(episodes.copy()),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Task:
        """The task whose ``state_dict`` this is; ``ValueError`` on missing or unknown entries."""
        state = {"episodes": None, "reward_map": None, **state}  # unknown to older checkpoints
        expected = {each.name for each in fields(cls)}
        if set(state) != expected:
            raise ValueError(
                f"a task was stored with {sorted(set(state) - expected)} and without "
                f"{sorted(expected - set(state))} of what this version of iql_torchrl knows; use the "
                "version that wrote it."
            )
        statistics: dict[str | Key, ObservationStatistics] = {}
        for entry in state["statistics"]:
            key = entry["key"] if isinstance(entry["key"], str) else tuple(entry["key"])
            mean, std, constant = entry["mean"], entry["std"], tuple(entry["constant"])
            statistics[key] = ObservationStatistics(mean, std, constant, entry["count"])
        scores, episodes = state["reference_scores"], state["episodes"]
        change = state["reward_map"]
        restored = {
            "observation_space": space_from_state(state["observation_space"]),
            "action_space": space_from_state(state["action_space"]),
            "statistics": statistics,
            "dtype": {"float32": torch.float32, "float64": torch.float64}[state["dtype"]],
            "reference_scores": None if scores is None else tuple(scores),
            "reward_map": None if change is None else RewardMap(*change),
            "episodes": None if episodes is None else episodes.numpy(),
        }
        return cls(**{**state, **restored})


def space_state(space: gym.Space[Any]) -> dict[str, Any]:
    """A Gymnasium space as plain data; arrays are tensors, so that no bit of them changes."""
    kind = type(space).__name__
    if isinstance(space, spaces.Dict):  # a list, because names have an order
        inner = [[name, space_state(child)] for name, child in space.spaces.items()]
        return {"type": "Dict", "spaces": inner}
    if kind not in ATTRIBUTES:
        raise ValueError(
            f"a {kind} space cannot be stored; expected Box, Discrete, MultiDiscrete, "
            "MultiBinary, or a Dict of them."
        )
    return {"type": kind, **{name: _plain(getattr(space, name)) for name in ATTRIBUTES[kind]}}


def _plain(value: Any) -> str | int | Tensor:
    """A space's attribute: a dtype as its name, integers, several numbers as a tensor."""
    if isinstance(value, np.dtype):
        return str(value)
    several = isinstance(value, np.ndarray | tuple)
    return torch.from_numpy(np.array(value)) if several else int(value)


def space_from_state(state: Mapping[str, Any]) -> gym.Space[Any]:
    """The space that :func:`space_state` described; ``ValueError`` for an unknown type."""
    kind = state["type"]
    if kind == "Dict":
        return spaces.Dict([(name, space_from_state(child)) for name, child in state["spaces"]])
    if kind not in ATTRIBUTES:
        raise ValueError(f"a stored space has the type {kind!r}, which this version does not know.")
    values = {name: state[name] for name in ATTRIBUTES[kind]}
    for name, value in values.items():
        if name == "dtype":
            values[name] = np.dtype(value).type
        elif isinstance(value, Tensor | list):
            values[name] = np.asarray(value)
    if kind == "Discrete" and values["dtype"] is np.int64:
        del values["dtype"]  # Gymnasium 1.0 supports no other and has no argument for it
    space: gym.Space[Any] = getattr(spaces, kind)(**values)
    return space
