"""What decides whether a memory-mapped table is still that of its source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari

from iql_torchrl.data.readers.environments import EnvLike, env_maker
from iql_torchrl.data.readers.minari import find_minari, minari_files
from iql_torchrl.data.readers.ogbench import is_ogbench, ogbench_files
from iql_torchrl.data.readers.opening import is_table_path, table_path_files
from iql_torchrl.data.readers.source import ReadOptions

__all__ = ["env_identity", "read_settings", "source_files"]


def source_files(source: Any, options: ReadOptions) -> tuple[Path, ...]:
    """Every file that the source reads; empty if any part of it is in memory."""
    if isinstance(source, list | tuple):
        parts = [source_files(item, options) for item in source]
        return tuple(path for part in parts for path in part) if all(parts) else ()
    if isinstance(source, str | Path) and is_table_path(source):
        return table_path_files(Path(source))
    if is_ogbench(source):
        return ogbench_files(source)
    if isinstance(source, str):
        source = find_minari(source, download=options.download)
    return minari_files(source) if isinstance(source, minari.MinariDataset) else ()


def env_identity(env: EnvLike | None) -> str | None:
    """The properties of an environment that decide how a table is read, as text."""
    if env is None:
        return None
    # The limit and the spaces that are registered under an id may change.
    instance = env if isinstance(env, gym.Env) else env_maker(env)()
    spaces = (
        f"{_space_identity(instance.observation_space)} {_space_identity(instance.action_space)}"
    )
    identity = f"{instance.spec} {spaces}"
    if instance is not env:
        instance.close()
    return identity


def _space_identity(space: gym.Space[Any] | None) -> str | None:
    """The text of a space, with a digest of its bounds, because the text shortens them."""
    if space is None:
        return None
    if isinstance(space, gym.spaces.Box):
        digest = hashlib.blake2b(space.low.tobytes() + space.high.tobytes(), digest_size=16)
        return f"{space} {digest.hexdigest()}"
    if isinstance(space, gym.spaces.Dict):
        return str({key: _space_identity(inner) for key, inner in space.spaces.items()})
    return str(space)


def read_settings(source: Any, options: ReadOptions) -> dict[str, Any]:
    """The settings in ``options`` that change the table, and the names of its sources."""
    selected = [
        hashlib.blake2b(str(list(map(int, part.episode_indices))).encode()).hexdigest()
        for part in (source if isinstance(source, list | tuple) else [source])
        if isinstance(part, minari.MinariDataset) and len(part) != part.storage.total_episodes
    ]
    selection = {"episodes": selected} if selected else {}
    return selection | {
        "columns": options.columns,
        "reward_offset": options.reward_offset,
        "max_episode_steps": options.max_episode_steps,
        "observation": _space_identity(options.observation_space),
        "action": _space_identity(options.action_space),
        "source": source if isinstance(source, str | Path | list | tuple) else None,
    }
