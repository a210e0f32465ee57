"""The index of a folder of shards: its rows, digests, and what describes the whole log.

The folder has ``INDEX``, ``EPISODES`` (returns and lengths of all episodes) and one folder for each
shard, which is a built table (``built_folder``) of consecutive whole episodes. A shard's record has the
statistics, the reward map and the episode numbers of the whole log.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from iql_torchrl.data.built_folder import (
    EPISODES,
    RECORD,
    checked_record,
    damaged,
    file_digest,
    verify_built,
)
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.data.shards.files import ShardFiles, is_address

__all__ = [
    "INDEX",
    "Shard",
    "check_shard",
    "digest_of",
    "is_sharded",
    "read_index",
    "shards_of",
    "verify_shards",
]

INDEX = "shards.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One shard: its folder in the folder of shards, its rows, and the digest of its files."""

    folder: str
    rows: int
    digest: str


def digest_of(checksums: Mapping[str, str]) -> str:
    """128-bit BLAKE2b of the checksums of all files of a shard; of its content alone."""
    text = json.dumps(dict(checksums), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_sharded(source: Any) -> TypeGuard[str | Path]:
    """Whether ``source`` is the path of a folder of shards."""
    if not isinstance(source, str | Path) or is_address(source):
        return False
    try:
        return (Path(source) / INDEX).is_file()
    except OSError:  # a text that is too long for a path
        return False


def read_index(files: ShardFiles) -> dict[str, Any]:
    """What ``INDEX`` contains. Raises ``DatasetError`` where it is absent or damaged."""
    try:
        content = files.read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{files.location}: has no {INDEX}, so it is no folder of shards; make one with "
            "python -m iql_torchrl.data build SOURCE FOLDER --shards N."
        ) from None
    try:
        saved: dict[str, Any] = json.loads(content)
        written = saved["format"]
        rows = sum(shard.rows for shard in shards_of(saved))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(files.location, f"{INDEX} cannot be read ({error})") from error
    if written != FORMAT:
        raise DatasetError(
            f"{files.location}: {INDEX} has format {written}, and this version reads {FORMAT}; build "
            "it again, or use the version that built it."
        )
    if rows != saved["rows"]:
        raise damaged(files.location, f"its shards have {rows} rows in place of {saved['rows']}")
    return saved


def shards_of(saved: Mapping[str, Any]) -> tuple[Shard, ...]:
    return tuple(Shard(s["folder"], s["rows"], s["digest"]) for s in saved["shards"])


def check_shard(folder: Path, shard: Shard, *, contents: bool) -> None:
    """Raise ``DatasetError`` unless ``folder`` has the files that the index lists for ``shard``.

    Sizes of files and the digest; with ``contents`` every byte, about a second per gigabyte.
    """
    if not folder.is_dir():
        raise damaged(folder, "this shard is missing")
    checksums = checked_record(folder).get("checksums", {})
    if digest_of(checksums) != shard.digest:
        raise damaged(
            folder, f"its digest in {RECORD} is another one than in {INDEX}: a shard of other data"
        )
    if contents:
        verify_built(folder)


def verify_shards(folder: str | Path) -> int:
    """Read every file of a folder of shards and compare it with its digest; the number of bytes.

    Raises ``DatasetError`` naming the first file that differs.
    """
    folder = Path(folder)
    saved = read_index(ShardFiles(str(folder)))
    episodes = folder / EPISODES
    if not episodes.is_file() or file_digest(episodes) != saved["episodes"]:
        raise damaged(
            folder, f"{EPISODES} is missing or has another content than when it was built"
        )
    total = episodes.stat().st_size
    for shard in shards_of(saved):
        check_shard(folder / shard.folder, shard, contents=False)
        total += verify_built(folder / shard.folder)
    return total
