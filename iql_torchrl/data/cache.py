"""Built tables kept on disk: made beside their place, renamed when whole, reused while fresh."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space, serialize_space
from tensordict import TensorDict

from iql_torchrl.data.build import TABLE, Built, build
from iql_torchrl.data.normalise import ObservationStatistics, RewardMap
from iql_torchrl.data.sources import Source
from iql_torchrl.data.transitions import DatasetError

__all__ = ["Description", "build_cached", "describe", "fingerprint", "load_built"]


@dataclass(frozen=True)
class Description:
    """What a dataset knows besides its rows."""

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


def fingerprint(files: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a built table depends on: each file's size and time, and the options.

    Without ``files`` (data in memory) nothing built is ever taken for fresh.
    """
    seen = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return {"format": 1, "files": seen, "options": {k: repr(v) for k, v in options.items()}}


def load_built(folder: Path, wanted: Mapping[str, Any]) -> tuple[Built, Description] | None:
    """The table in ``folder`` if it was built from the same files with the same options.

    With it comes its description, so that the source need not be opened. None where there is
    nothing, or something stale of ours. Raises ``DatasetError`` where the
    folder holds anything else, which is never overwritten.
    """
    if not folder.exists():
        return None
    record = folder / "built.json"
    if not record.is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            return None
        raise DatasetError(
            f"memmap={folder}: exists and was not made by load_dataset; choose another path."
        )
    try:
        saved = json.loads(record.read_text())
    except ValueError:
        return None
    if not wanted.get("files") or saved.get("fingerprint") != wanted:
        return None
    with np.load(folder / "episodes.npz") as episodes:
        returns, lengths = episodes["returns"], episodes["lengths"]
    statistics = {
        tuple(item["key"]): ObservationStatistics(
            torch.tensor(item["mean"], dtype=torch.float32).reshape(item["shape"]),
            torch.tensor(item["std"], dtype=torch.float32).reshape(item["shape"]),
            tuple(item["constant"]),
            item["count"],
        )
        for item in saved["statistics"]
    }
    built = Built(
        TensorDict.load_memmap(folder / TABLE), returns, lengths, statistics,
        RewardMap(*saved["reward_map"]), tuple(saved["notes"]),
    )  # fmt: skip
    return built, _described(saved["description"])


def _described(saved: Mapping[str, Any]) -> Description:
    scores, spec = saved["reference_scores"], saved["env_spec"]
    return Description(
        name=saved["name"],
        observation_space=deserialize_space(saved["observation_space"]),
        action_space=deserialize_space(saved["action_space"]),
        env_spec=None if spec is None else EnvSpec.from_json(spec),
        reference_scores=None if scores is None else (scores[0], scores[1]),
    )


def _record(built: Built, source: Source, wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "fingerprint": wanted,
        "description": {
            "name": source.name,
            "observation_space": serialize_space(source.observation_space),
            "action_space": serialize_space(source.action_space),
            "env_spec": None if source.env_spec is None else source.env_spec.to_json(),
            "reference_scores": source.reference_scores,
        },
        "reward_map": [built.map.scale, built.map.shift],
        "notes": list(built.notes),
        "statistics": [
            {
                "key": list(key), "shape": list(s.mean.shape), "count": s.count,
                "mean": s.mean.flatten().tolist(), "std": s.std.flatten().tolist(),
                "constant": list(s.constant),
            }
            for key, s in built.statistics.items()
        ],
    }  # fmt: skip


def build_cached(
    source: Source, folder: Path, wanted: Mapping[str, Any], **how: Any
) -> tuple[Built, Description]:
    """``build`` into ``folder``: made beside it and renamed when whole, so never half there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        built = build(source, folder=staging / TABLE, **how)
        np.savez(
            staging / "episodes.npz", returns=built.episode_returns, lengths=built.episode_lengths
        )
        (staging / "built.json").write_text(json.dumps(_record(built, source, wanted)))
        _swap(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    built.transitions = TensorDict.load_memmap(folder / TABLE)
    return built, describe(source)


def _swap(new: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.rename(folder, old / "table")
    os.rename(new, folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
