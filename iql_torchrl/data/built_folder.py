"""Folders of built tables: opened without their source, on any machine, and verified.

Such a folder has ``RECORD`` (what identifies it and everything but the rows), ``EPISODES`` (returns
and lengths) and ``TABLE`` (one memory-mapped file per leaf). ``load_dataset(memmap=...)`` and
``python -m iql_torchrl.data build`` write it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space
from tensordict import TensorDict

from iql_torchrl.data.build import TABLE, Built
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import ObservationStatistics, RewardMap, reward_map
from iql_torchrl.data.schema import REWARD, DatasetError

__all__ = [
    "EPISODES",
    "RECORD",
    "Description",
    "checksums",
    "describe",
    "described",
    "file_sizes",
    "is_built",
    "open_built",
    "read_table",
    "verify_built",
]

RECORD = "built.json"
EPISODES = "episodes.npz"
READ_AT_ONCE = 16 * 2**20
AGAIN = "copy the folder again, or build it again"


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


def read_table(folder: Path, saved: Mapping[str, Any]) -> Built:
    """The table of a complete folder; ``saved`` is what its ``RECORD`` contains."""
    # np.load leaves a file open that it was given by name and cannot read
    with (folder / EPISODES).open("rb") as file, np.load(file) as episodes:
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
        RewardMap(*saved["reward_map"]), tuple(saved["notes"]), tuple(saved["warnings"]),
    )  # fmt: skip
    if len(built.transitions) != lengths.sum():
        raise ValueError(f"{folder}: {len(built.transitions)} rows in place of {lengths.sum()}")
    return built


def described(record: Mapping[str, Any]) -> Description:
    saved = record["description"]
    scores, spec = saved["reference_scores"], saved["env_spec"]
    return Description(
        name=saved["name"],
        observation_space=deserialize_space(saved["observation_space"]),
        action_space=deserialize_space(saved["action_space"]),
        env_spec=None if spec is None else EnvSpec.from_json(spec),
        reference_scores=None if scores is None else (scores[0], scores[1]),
    )


def file_sizes(table: Path) -> dict[str, int]:
    """Bytes of each file of a memory-mapped table, by its path inside ``table``."""
    return {
        path.relative_to(table).as_posix(): path.stat().st_size
        for path in sorted(table.rglob("*"))
        if path.is_file()
    }


def checksums(folder: Path) -> dict[str, str]:
    """128-bit BLAKE2b digest of every file of the table and of ``EPISODES``, by path in ``folder``."""
    files = [folder / EPISODES, *(folder / TABLE / name for name in file_sizes(folder / TABLE))]
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def is_built(source: Any) -> TypeGuard[str | Path]:
    """Whether ``source`` is the path of a folder of a built table, complete or not."""
    if not isinstance(source, str | Path):
        return False
    try:
        folder = Path(source)
        return (folder / RECORD).is_file() or (folder / TABLE / "meta.json").is_file()
    except OSError:  # a text that is too long for a path
        return False


def open_built(
    folder: Path, *, reward: Any, dtype: torch.dtype, fixed: Mapping[str, Any]
) -> tuple[Built, Description, tuple[str, ...]]:
    """The table, its description, and the leaves that were joined into the observation.

    Rewards that were built raw are mapped here, in memory (one column), with the same numbers as if
    the source was read with ``reward``. ``fixed``: options of ``load_dataset`` that only a build can
    follow; each must be empty.

    Raises ``DatasetError`` with one sentence: an incomplete or damaged folder, an option of
    ``fixed``, another ``dtype``, or another reward map where rewards were mapped by the build.
    """
    given = [name for name, value in fixed.items() if value]
    if given:
        raise DatasetError(
            f"{folder}: {given[0]}={fixed[given[0]]!r} cannot be applied to a table that is built "
            f"already; leave {given[0]} out, or load the source with it."
        )
    saved = _checked_record(folder)
    try:
        built, description = read_table(folder, saved), described(saved)
        joined = ast.literal_eval(saved["fingerprint"]["options"]["concatenate"])
    except Exception as error:  # damaged in a way that the sizes of files do not show
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    found = built.transitions[REWARD].dtype
    if found != dtype:
        raise DatasetError(
            f"{folder}: was built with dtype={found} and dtype={dtype} is asked for; pass "
            f"dtype={found}, or build it again."
        )
    return _with_reward(built, reward, folder), description, tuple(joined or ())


def verify_built(folder: str | Path) -> int:
    """Read every file of a built table and compare it with its checksum; the number of bytes read.

    About a second per gigabyte. Raises ``DatasetError`` naming the first file that differs, and
    where the folder was built by a version that wrote no checksums.
    """
    folder = Path(folder)
    saved = _checked_record(folder)
    expected = saved.get("checksums")
    if not isinstance(expected, dict):
        raise DatasetError(
            f"{folder}: an older version built it without checksums; build it again."
        )
    total = 0
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if _digest(path) != digest:
            raise _damaged(folder, f"{name} has another content than when it was built")
        total += path.stat().st_size
    return total


def _checked_record(folder: Path) -> dict[str, Any]:
    """What ``RECORD`` contains, if every file of the table has the size that it had when built."""
    path = folder / RECORD
    if not path.is_file():
        if not is_built(folder):
            raise DatasetError(
                f"{folder}: not a built table, which has a {RECORD}; make one with "
                f"python -m iql_torchrl.data build SOURCE {folder}"
            )
        raise _damaged(folder, f"{RECORD} is missing")
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        expected: dict[str, int] = dict(saved["sizes"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{RECORD} cannot be read ({error})") from error
    if not (folder / EPISODES).is_file():
        raise _damaged(folder, f"{EPISODES} is missing")
    sizes = file_sizes(folder / TABLE)
    for name, size in expected.items():
        if name not in sizes:
            raise _damaged(folder, f"{TABLE}/{name} is missing")
        if sizes[name] != size:
            raise _damaged(folder, f"{TABLE}/{name} has {sizes[name]:,} bytes, built with {size:,}")
    return saved


def _damaged(folder: Path, reason: str) -> DatasetError:
    return DatasetError(f"{folder}: incomplete or damaged ({reason}); {AGAIN}.")


def _with_reward(built: Built, reward: Any, folder: Path) -> Built:
    try:
        change = reward_map(reward, built.episode_returns)
    except ValueError as error:
        raise DatasetError(f"{folder}: {error}") from None
    if change == built.map:
        return built
    if built.map != RewardMap():
        raise DatasetError(
            f"{folder}: its rewards were mapped with reward={built.map.scale, built.map.shift} when "
            f"it was built, and reward={reward!r} is another map; pass the first, or build it with "
            "raw rewards, to which any map can be applied."
        )
    table = built.transitions.clone(recurse=False)
    raw = table[REWARD]
    table[REWARD] = change.forward(raw.double()).to(raw.dtype)
    return replace(built, transitions=table, map=change)
