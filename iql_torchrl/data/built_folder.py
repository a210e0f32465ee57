"""Folders of built tables: opened without their source, on any machine, and verified.

Such a folder has ``RECORD`` (what identifies it and everything but the rows), ``EPISODES`` (returns
and lengths) and ``TABLE`` (one memory-mapped file per leaf). ``load_dataset(memmap=...)`` and
``python -m iql_torchrl.data build`` write it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from tensordict import TensorDict

from iql_torchrl.data.build import TABLE, Built, Measured
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import RewardMap, reward_map
from iql_torchrl.data.schema import REWARD, DatasetError
from iql_torchrl.data.table_record import (
    Description,
    described,
    joined_leaves,
    read_measured,
    record,
)
from iql_torchrl.files import leads_below

__all__ = [
    "EPISODES",
    "RECORD",
    "asked_map",
    "checked_record",
    "checksums",
    "damaged",
    "file_digest",
    "file_sizes",
    "is_built",
    "load_rows",
    "open_built",
    "read_table",
    "verify_built",
    "with_rewards",
    "write_record",
]

RECORD = "built.json"
EPISODES = "episodes.npz"
READ_AT_ONCE = 16 * 2**20
AGAIN = "copy the folder again, or build it again"


def read_table(folder: Path, saved: Mapping[str, Any]) -> Built:
    """The table of a complete folder; ``saved`` is what its ``RECORD`` contains."""
    # np.load leaves a file open that it was given by name and cannot read
    with (folder / EPISODES).open("rb") as file, np.load(file) as episodes:
        returns, lengths = episodes["returns"], episodes["lengths"]
    measured = read_measured(saved, returns, lengths)
    built = Built(transitions=load_rows(folder / TABLE), **vars(measured))
    if len(built.transitions) != lengths.sum():
        raise ValueError(f"{folder}: {len(built.transitions)} rows in place of {lengths.sum()}")
    return built


def load_rows(table: Path) -> TensorDict:
    """The rows of a memory-mapped table.

    Raises ``DatasetError`` on files that are neither numbers nor their description: tensordict would
    load a pickle, which runs code; and on descriptions of files outside of the table.
    """
    for path in sorted(table.rglob("*")):
        described = json.loads(path.read_text()) if path.name == "meta.json" else ()
        if not all(map(leads_below, described)):
            raise DatasetError(
                f"{path}: names a file outside of its folder; build the table again."
            )
        if path.is_file() and path.suffix not in (".memmap", ".json"):
            raise DatasetError(
                f"{path}: a table has .memmap and .json files only, and a pickle would run code when "
                "it is read; delete this file if you know where it is from, or build the table again."
            )
    return TensorDict.load_memmap(table)


def write_record(
    folder: Path, measured: Measured, source: Source, expected: Mapping[str, Any]
) -> dict[str, Any]:
    """Complete the folder of a table with ``EPISODES`` and ``RECORD``; what the latter contains."""
    np.savez(folder / EPISODES, returns=measured.episode_returns, lengths=measured.episode_lengths)
    saved = record(measured, source, expected) | {
        "sizes": file_sizes(folder / TABLE),
        "checksums": checksums(folder),
    }
    (folder / RECORD).write_text(json.dumps(saved))
    return saved


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
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
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
    saved = checked_record(folder)
    try:
        built, description = read_table(folder, saved), described(saved)
        joined = joined_leaves(saved)
    except Exception as error:  # damaged in a way that the sizes of files do not show
        raise damaged(folder, f"{type(error).__name__}: {error}") from error
    stored = built.transitions[REWARD].dtype
    if stored != dtype:
        raise DatasetError(
            f"{folder}: was built with dtype={stored} and dtype={dtype} is asked for; pass "
            f"dtype={stored}, or build it again."
        )
    change = asked_map(reward, built, str(folder))
    table = with_rewards(built.transitions, built.map, change)
    return replace(built, transitions=table, map=change), description, joined


def verify_built(folder: str | Path) -> int:
    """Read every file of a built table and compare it with its checksum; the number of bytes read.

    About a second per gigabyte. Raises ``DatasetError`` naming the first file that differs, and
    where the folder was built by a version that wrote no checksums.
    """
    folder = Path(folder)
    saved = checked_record(folder)
    expected = saved.get("checksums")
    if not isinstance(expected, dict):
        raise DatasetError(
            f"{folder}: an older version built it without checksums; build it again."
        )
    total = 0
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if file_digest(path) != digest:
            raise damaged(folder, f"{name} has another content than when it was built")
        total += path.stat().st_size
    return total


def checked_record(folder: Path) -> dict[str, Any]:
    """What ``RECORD`` contains, if every file of the table has the size that it had when built."""
    path = folder / RECORD
    if not path.is_file():
        if not is_built(folder):
            raise DatasetError(
                f"{folder}: not a built table, which has a {RECORD}; make one with "
                f"python -m iql_torchrl.data build SOURCE {folder}"
            )
        raise damaged(folder, f"{RECORD} is missing")
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        expected: dict[str, int] = dict(saved["sizes"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"{RECORD} cannot be read ({error})") from error
    if not (folder / EPISODES).is_file():
        raise damaged(folder, f"{EPISODES} is missing")
    sizes = file_sizes(folder / TABLE)
    for name, size in expected.items():
        if name not in sizes:
            raise damaged(folder, f"{TABLE}/{name} is missing")
        if sizes[name] != size:
            raise damaged(folder, f"{TABLE}/{name} has {sizes[name]:,} bytes, built with {size:,}")
    return saved


def damaged(folder: str | Path, reason: str) -> DatasetError:
    return DatasetError(f"{folder}: incomplete or damaged ({reason}); {AGAIN}.")


def asked_map(reward: Any, measured: Measured, name: str) -> RewardMap:
    """The map that ``reward`` asks for, of a table whose rewards have the map of ``measured``.

    Raises ``DatasetError`` where that is another map and the rewards are not raw.
    """
    try:
        change = reward_map(reward, measured.episode_returns)
    except ValueError as error:
        raise DatasetError(f"{name}: {error}") from None
    if change != measured.map and measured.map != RewardMap():
        raise DatasetError(
            f"{name}: its rewards were mapped with "
            f"reward={measured.map.scale, measured.map.shift} when "
            f"it was built, and reward={reward!r} is another map; pass the first, or build it with "
            "raw rewards, to which any map can be applied."
        )
    return change


def with_rewards(table: TensorDict, stored: RewardMap, change: RewardMap) -> TensorDict:
    """The table with rewards mapped by ``change``, in memory; itself where they are so stored."""
    if change == stored:
        return table
    table = table.clone(recurse=False)
    raw = table[REWARD]
    table[REWARD] = change.forward(raw.double()).to(raw.dtype)
    return table
