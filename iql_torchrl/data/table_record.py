"""Everything about a built table but its rows and episodes, as JSON has it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space, serialize_space
from numpy.typing import NDArray

from iql_torchrl.data.build import Measured
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import ObservationStatistics, RewardMap, known_scores

__all__ = ["Description", "describe", "described", "joined_leaves", "read_measured", "record"]


@dataclass(frozen=True)
class Description:
    """Everything about a dataset except its rows."""

    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    env_spec: EnvSpec | None
    reference_scores: tuple[float, float] | None


def describe(source: Source) -> Description:
    return Description(
        source.name, source.observation_space, source.action_space, source.env_spec,
        source.reference_scores,
    )  # fmt: skip


def record(measured: Measured, source: Source, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a table but its rows and episodes, as JSON has it.

    ``expected``: what identifies its source and the options that it was read with.
    """
    return {
        "fingerprint": expected,
        "description": {
            "name": source.name,
            "observation_space": serialize_space(source.observation_space),
            "action_space": serialize_space(source.action_space),
            "env_spec": None if source.env_spec is None else source.env_spec.to_json(),
            "reference_scores": source.reference_scores,
        },
        "reward_map": [measured.map.scale, measured.map.shift],
        "notes": list(measured.notes),
        "warnings": list(measured.warnings),
        "statistics": [
            {
                "key": list(key), "shape": list(s.mean.shape), "count": s.count,
                "mean": s.mean.flatten().tolist(), "std": s.std.flatten().tolist(),
                "constant": list(s.constant),
            }
            for key, s in measured.statistics.items()
        ],
    }  # fmt: skip


def read_measured(
    saved: Mapping[str, Any], returns: NDArray[np.float64], lengths: NDArray[np.int64]
) -> Measured:
    """What ``record`` wrote, with the returns and lengths of the episodes."""
    statistics = {
        tuple(item["key"]): ObservationStatistics(
            torch.tensor(item["mean"], dtype=torch.float32).reshape(item["shape"]),
            torch.tensor(item["std"], dtype=torch.float32).reshape(item["shape"]),
            tuple(item["constant"]),
            item["count"],
        )
        for item in saved["statistics"]
    }
    return Measured(
        episode_returns=returns, episode_lengths=lengths, statistics=statistics,
        map=RewardMap(*saved["reward_map"]), notes=tuple(saved["notes"]),
        warnings=tuple(saved["warnings"]),
    )  # fmt: skip


def described(record: Mapping[str, Any]) -> Description:
    saved = record["description"]
    scores, spec = saved["reference_scores"], saved["env_spec"]
    return Description(
        name=saved["name"],
        observation_space=deserialize_space(saved["observation_space"]),
        action_space=deserialize_space(saved["action_space"]),
        env_spec=None if spec is None else EnvSpec.from_json(spec),
        reference_scores=known_scores(None if scores is None else (scores[0], scores[1])),
    )


def joined_leaves(saved: Mapping[str, Any]) -> tuple[str, ...]:
    """The leaves that were joined into the observation, from a record."""
    return tuple(ast.literal_eval(saved["fingerprint"]["options"]["concatenate"]) or ())
