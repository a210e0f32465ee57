"""The description of the data that networks need; small enough to be saved with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torchrl.data import Composite, TensorSpec

from iql_torchrl.data import DatasetSummary, ObservationStatistics
from iql_torchrl.data.schema import ACTION, Key, leaf_spaces, spec_of_space

__all__ = ["Task", "space_from_state", "space_state"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, eq=False)
class Task:
    """Observations and actions as the environment has them, and the log's statistics.

    Attributes:
        observation_space, action_space: Gymnasium's.
        statistics: per observation key, as ``OfflineDataset`` has them; not of categories and images.
        masked: whether each observation has a bool ``action_mask`` ``(n,)``.
        dtype: torch.float32 or torch.float64, of observations and continuous actions.
        name: of the data, for display.
        reference_scores: raw returns (random, expert), or None.
        episodes: digests of some of the log's episodes (``data.episode_digests``). With them an
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
    episodes: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, dataset: DatasetSummary) -> Task:
        """The task that ``dataset`` is a log of."""
        return cls(
            dataset.observation_space,
            dataset.action_space,
            dict(dataset.statistics),
            dataset.masked,
            dataset.dtype,
            dataset.name,
            dataset.reference_scores,
            dataset.sketch(),
        )

    @property
    def observation_spec(self) -> Composite:
        """``Composite`` with the key ``observation``, nested below it for Dict spaces."""
        spec = Composite()
        for key, leaf in leaf_spaces(self.observation_space).items():
            spec[key] = spec_of_space(leaf, self.dtype, key)
        return spec

    @property
    def action_spec(self) -> TensorSpec:
        """Bounded for Box, Categorical for Discrete: the policy's indices count from zero."""
        return spec_of_space(self.action_space, self.dtype, ACTION)

    def state_dict(self) -> dict[str, Any]:
        """Only numbers, strings, lists, dicts and tensors: readable with ``weights_only=True``."""
        statistics = [
            {
                "key": key if isinstance(key, str) else list(key),
                "mean": _own(s.mean),
                "std": _own(s.std),
                "constant": list(s.constant),
                "count": int(s.count),
            }
            for key, s in self.statistics.items()
        ]
        scores = self.reference_scores
        return {
            "observation_space": space_state(self.observation_space),
            "action_space": space_state(self.action_space),
            "statistics": statistics,
            "masked": bool(self.masked),
            "dtype": str(self.dtype).removeprefix("torch."),
            "name": self.name,
            "reference_scores": None if scores is None else [float(score) for score in scores],
            "episodes": None if self.episodes is None else torch.from_numpy(self.episodes.copy()),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Task:
        """The task whose ``state_dict`` this is.

        Raises ``ValueError`` naming the entries that are missing or unknown.
        """
        state = {"episodes": None, **state}  # unknown to the first checkpoints
        _check_names("a task", state, {f.name for f in fields(cls)})
        statistics: dict[str | Key, ObservationStatistics] = {}
        for entry in state["statistics"]:
            _check_names("a task's statistics", entry, {"key", *STATISTICS})
            key = entry["key"] if isinstance(entry["key"], str) else tuple(entry["key"])
            mean, std, constant, count = (entry[name] for name in STATISTICS)
            statistics[key] = ObservationStatistics(_own(mean), _own(std), tuple(constant), count)
        if state["dtype"] not in DTYPES:
            raise ValueError(
                f"a task's dtype is {state['dtype']!r}; expected one of {list(DTYPES)}."
            )
        scores = state["reference_scores"]
        return cls(
            space_from_state(state["observation_space"]),
            space_from_state(state["action_space"]),
            statistics,
            bool(state["masked"]),
            DTYPES[state["dtype"]],
            state["name"],
            None if scores is None else (float(scores[0]), float(scores[1])),
            None if state["episodes"] is None else state["episodes"].numpy(),
        )


STATISTICS = tuple(f.name for f in fields(ObservationStatistics))


def space_state(space: gym.Space[Any]) -> dict[str, Any]:
    """A Gymnasium space as plain data; bounds are tensors, so that no bit of them changes.

    Raises ``ValueError`` for another space than Box, Discrete, MultiDiscrete, MultiBinary or a
    Dict of these.
    """
    kind = str(np.dtype(space.dtype)) if space.dtype is not None else None
    if isinstance(space, spaces.Dict):  # a list, because names have an order
        inner = [[name, space_state(child)] for name, child in space.spaces.items()]
        return {"type": "Dict", "spaces": inner}
    if isinstance(space, spaces.Box):
        low, high = (torch.from_numpy(b.copy()) for b in (space.low, space.high))
        return {"type": "Box", "low": low, "high": high, "dtype": kind}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": kind}
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = space.nvec.tolist(), space.start.tolist()
        return {"type": "MultiDiscrete", "nvec": nvec, "start": start, "dtype": kind}
    if isinstance(space, spaces.MultiBinary):
        count = list(space.n) if isinstance(space.n, Sequence) else int(space.n)
        return {"type": "MultiBinary", "n": count}
    raise ValueError(
        f"a {type(space).__name__} space cannot be stored; expected Box, Discrete, MultiDiscrete, "
        "MultiBinary, or a Dict of them."
    )


def space_from_state(state: Mapping[str, Any]) -> gym.Space[Any]:
    """The space that :func:`space_state` described; ``ValueError`` for an unknown type."""
    kind = state["type"]
    if kind == "Dict":
        return spaces.Dict([(name, space_from_state(child)) for name, child in state["spaces"]])
    if kind == "Box":
        low, high = state["low"].numpy(), state["high"].numpy()
        return spaces.Box(low, high, low.shape, np.dtype(state["dtype"]).type)
    if kind == "Discrete":
        # Gymnasium 1.0 supports only int64 and has no argument for the dtype.
        options = {} if state["dtype"] == "int64" else {"dtype": np.dtype(state["dtype"]).type}
        return spaces.Discrete(state["n"], start=state["start"], **options)
    if kind == "MultiDiscrete":
        dtype = np.dtype(state["dtype"]).type
        return spaces.MultiDiscrete(state["nvec"], dtype=dtype, start=state["start"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(state["n"])
    raise ValueError(f"a stored space has the type {kind!r}, which this version does not know.")


def _own(values: torch.Tensor) -> torch.Tensor:
    """A copy with its own memory, because saving a view would save the tensor it is a part of."""
    return values.detach().cpu().clone()


def _check_names(what: str, state: Mapping[str, Any], expected: set[str]) -> None:
    if missing := sorted(expected - set(state)):
        raise ValueError(f"{what} was stored without {missing}; it holds {sorted(state)}.")
    if unknown := sorted(set(state) - expected):
        raise ValueError(
            f"{what} was stored with {unknown}, which this version of iql_torchrl does not know; "
            "use the version that wrote it."
        )
