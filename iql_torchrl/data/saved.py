"""Logs on disk: one format for memory-mapped tables and for shards, written whole and verified.

A folder has ``RECORD`` (everything but the rows, and the size and digest of each file), ``EPISODES``
(returns and lengths of all episodes) and one folder for each shard, which is a memory-mapped table of
consecutive whole episodes. The table that ``load_dataset(memmap=FOLDER)`` writes is a log of one shard.
A folder is opened without its source, on any machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard

import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space, serialize_space
from numpy.typing import NDArray
from tensordict import TensorDict

from iql_torchrl.data.build import Description, DiskTables, fill, layout_of, row_bytes
from iql_torchrl.data.digests import episode_digests, sketch_of
from iql_torchrl.data.readers.concatenation import joined_env_maker
from iql_torchrl.data.readers.environments import EnvLike, env_maker, recorded_env_maker
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import ObservationStatistics, RewardMap, known_scores, reward_map
from iql_torchrl.data.schema import REWARD, DatasetError, DatasetWarning, Field, Key, Layout
from iql_torchrl.descriptions import one_line
from iql_torchrl.files import leads_below

try:
    import fcntl
except ImportError:  # Windows: folders are used without locks.
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "RECORD",
    "Log",
    "Shard",
    "asked_map",
    "check_files",
    "damaged",
    "dataset_fields",
    "folder_lock",
    "is_saved",
    "is_sharded",
    "load_rows",
    "local_log",
    "mapped",
    "open_saved",
    "read_log",
    "staged_folder",
    "text_digest",
    "verify",
    "write_log",
]

RECORD, EPISODES = "built.json", "episodes.npz"
FORMAT = 3  # of ``RECORD``
READ_AT_ONCE = 16 * 2**20

Files = Mapping[str, tuple[int, str]]  # by path: bytes, and digest


@dataclass(frozen=True)
class Shard:
    """One shard: its folder, its rows, how many episodes, and its files by their paths in it."""

    folder: str
    rows: int
    episodes: int
    files: Files

    @property
    def digest(self) -> str:
        """Of the content of all files."""
        digests = {name: digest for name, (_, digest) in self.files.items()}
        return text_digest(json.dumps(digests, sort_keys=True).encode())


@dataclass(frozen=True, kw_only=True)
class Log:
    """What the record of a folder says.

    ``ranges``: smallest and largest number of each entry over all rows. ``sketch``: see
    ``digests.sketch_of``. ``source``: the ``identity`` of what it was built from, None where the
    folder is never built again.
    """

    description: Description
    shards: tuple[Shard, ...]
    episodes: tuple[int, str]
    layout: Layout
    ranges: dict[Key, tuple[float, float]]
    sketch: NDArray[np.int64]
    source: dict[str, Any] | None


# -- writing


def write_log(
    source: Source,
    folder: Path,
    edges: NDArray[np.int64],
    built_from: dict[str, Any] | None,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Log:
    """Read ``source`` once, in bounded memory, into a folder that is complete or absent.

    Shard n has the episodes ``edges[n]`` to ``edges[n + 1]``. ``options`` are those of ``fill``.
    Raises ``DatasetError`` where the disk is or becomes full.
    """
    layout = layout_of(source, dtype)
    lengths = source.episode_lengths
    first = np.concatenate([[0], np.cumsum(lengths)])[edges]
    names = [f"shard-{number:05d}" for number in range(len(edges) - 1)]
    with staged_folder(folder, source.rows * row_bytes(layout)) as staging:
        tables = DiskTables(layout, first, [staging / name for name in names])
        description = fill(source, tables, **options)
        returns = description.episode_returns
        np.savez(staging / EPISODES, returns=returns, lengths=lengths)
        shards, sketches = [], []
        for number, name in enumerate(names):
            own = slice(edges[number], edges[number + 1])
            part = SimpleNamespace(
                transitions=TensorDict.load_memmap(staging / name),
                episode_returns=returns[own], episode_lengths=lengths[own],
            )  # fmt: skip
            sketches.append(sketch_of(episode_digests(part)))
            shards.append({
                "folder": name, "rows": len(part.transitions), "episodes": len(lengths[own]),
                "files": _sizes_and_digests(staging / name),
            })  # fmt: skip
        entries = [
            [
                list(key),
                list(f.shape),
                str(f.dtype).removeprefix("torch."),
                list(tables.ranges[key]),
            ]
            for key, f in layout.items()
        ]
        record = {
            "format": FORMAT, "source": built_from, "shards": shards, "entries": entries,
            "episodes": _sizes_and_digests(staging)[EPISODES],
            "sketch": sketch_of(np.concatenate(sketches)).tolist(), **_recorded(description),
        }  # fmt: skip
        (staging / RECORD).write_text(json.dumps(record))
    return local_log(folder)


def _recorded(description: Description) -> dict[str, Any]:
    """A description without its episodes, as JSON has it."""
    spec, change = description.env_spec, description.reward_map
    unchanged = ("name", "reference_scores", "joined", "notes", "warnings")
    return {name: getattr(description, name) for name in unchanged} | {
        "observation_space": serialize_space(description.observation_space),
        "action_space": serialize_space(description.action_space),
        "env_spec": None if spec is None else spec.to_json(),
        "reward_map": [change.scale, change.shift],
        "statistics": [
            [key, s.mean.tolist(), s.std.tolist(), s.constant, s.count]
            for key, s in description.statistics.items()
        ],
    }


def text_digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _sizes_and_digests(folder: Path) -> dict[str, tuple[int, str]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _file_digest(path))
        for path in files
    }


@contextlib.contextmanager
def staged_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A temporary folder, which takes the place of ``folder`` when the block ends without an error.

    Raises ``DatasetError`` with the needed and the free space where the disk is or becomes full.
    """
    parent = folder.absolute().parent
    try:
        if needed > shutil.disk_usage(parent).free:
            raise OSError(errno.ENOSPC, "nothing was written")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            if folder.exists():
                os.rename(folder, Path(temporary) / "old")
            os.rename(new, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(parent).free
        raise DatasetError(
            f"{folder}: the table needs {needed:,} bytes and {free:,} are free on the disk of {parent} "
            f"({error.strerror}). Make room, choose a folder on another disk, or read less with "
            "limit=. A table that exists already stays until the new one is complete."
        ) from error


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock ``.<name>.lock`` next to ``folder`` (``fcntl.flock``); waits for it.

    The holder deletes the lock file. Nothing is locked where ``fcntl`` is missing, where the parent of
    the folder is read-only, and on file systems without locks.
    """
    path, file = folder.absolute().parent / f".{folder.name}.lock", None
    with contextlib.suppress(OSError):
        file = None if fcntl is None else _locked(path)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            os.close(file)


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:  # the holder before has deleted it
            pass
        except OSError:
            os.close(file)
            raise
        os.close(file)


# -- reading


def read_log(location: str | Path, read: Callable[[str], bytes]) -> Log:
    """The log at ``location``, of whose files ``read`` returns the content; reads no rows.

    Raises ``DatasetError`` where the record is absent, of another version, or damaged.
    """
    try:
        saved = json.loads(read(RECORD))
        if saved.get("format") != FORMAT:
            raise DatasetError(
                f"{location}: was built by another version of this package; build it again."
            )
        shards = tuple(Shard(**each) for each in saved["shards"])
        entries = [(tuple(key), *rest) for key, *rest in saved["entries"]]
        content = read(EPISODES)
        with np.load(io.BytesIO(content)) as episodes:
            returns, lengths = episodes["returns"], episodes["lengths"]
        log = Log(
            description=_described(saved, returns, lengths),
            shards=shards,
            episodes=(saved["episodes"][0], saved["episodes"][1]),
            layout={k: Field(tuple(s), getattr(torch, d)) for k, s, d, _ in entries},
            ranges={key: (low, high) for key, _, _, (low, high) in entries},
            sketch=np.array(saved["sketch"], np.int64),
            source=saved["source"],
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        name = EPISODES if EPISODES in str(error) else RECORD
        raise DatasetError(
            f"{location}: {name} is missing: no folder of a built table or of shards, an incomplete "
            "one, or one of an older version; copy it again, or build it with python -m "
            "iql_torchrl.data build SOURCE FOLDER [--shards N]."
        ) from None
    except DatasetError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise damaged(
            location, f"{RECORD} or {EPISODES} cannot be read: {one_line(error)}"
        ) from error
    names = [name for shard in shards for name in (shard.folder, *shard.files)]
    if outside := [name for name in names if not leads_below(name)]:
        raise DatasetError(
            f"{location}: it names the file or folder {outside[0]!r}; expected a path below its own "
            "folder. The record is damaged or not from this package: build it again."
        )
    rows, expected = sum(shard.rows for shard in shards), int(lengths.sum())
    if rows != expected:
        raise damaged(location, f"its shards have {rows} rows in place of {expected}")
    return log


def _described(
    saved: Mapping[str, Any], returns: NDArray[np.float64], lengths: NDArray[np.int64]
) -> Description:
    scores, spec = saved["reference_scores"], saved["env_spec"]
    statistics = {
        key if isinstance(key, str) else tuple(key): ObservationStatistics(
            torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32),
            tuple(constant), count,
        )
        for key, mean, std, constant, count in saved["statistics"]
    }  # fmt: skip
    return Description(
        name=saved["name"],
        observation_space=deserialize_space(saved["observation_space"]),
        action_space=deserialize_space(saved["action_space"]),
        env_spec=None if spec is None else EnvSpec.from_json(spec),
        reference_scores=known_scores(None if scores is None else tuple(scores)),
        episode_returns=returns,
        episode_lengths=lengths,
        statistics=statistics,
        reward_map=RewardMap(*saved["reward_map"]),
        **{name: tuple(saved[name]) for name in ("joined", "notes", "warnings")},
    )


def local_log(folder: Path) -> Log:
    """The log of a folder of this machine whose files have the sizes that they had when built."""
    log = read_log(folder, lambda name: (folder / name).read_bytes())
    check_files(folder, {EPISODES: log.episodes}, contents=False)
    for shard in log.shards:
        check_files(folder / shard.folder, shard.files, contents=False)
    return log


def check_files(folder: Path, files: Files, *, contents: bool) -> int:
    """Raise ``DatasetError`` unless ``folder`` has ``files``; their number of bytes.

    With ``contents`` every byte is compared with the digests: about a second per gigabyte.
    """
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if path.stat().st_size != size:
            raise damaged(folder, f"{name} has {path.stat().st_size:,} bytes, built with {size:,}")
        if contents and _file_digest(path) != digest:
            raise damaged(folder, f"{name} has another content than when it was built")
    return sum(size for size, _ in files.values())


def verify(folder: str | Path) -> int:
    """Compare every byte of a built table or of shards with its digest; the number of bytes.

    Raises ``DatasetError`` naming the first file that differs.
    """
    folder = Path(folder)
    log = local_log(folder)
    return check_files(folder, {EPISODES: log.episodes}, contents=True) + sum(
        check_files(folder / shard.folder, shard.files, contents=True) for shard in log.shards
    )


def damaged(folder: str | Path, reason: str) -> DatasetError:
    return DatasetError(
        f"{folder}: incomplete or damaged ({reason}); copy the folder again, or build it again."
    )


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


# -- opening as a dataset


def is_saved(source: Any) -> TypeGuard[str | Path]:
    """Whether ``source`` is the path of a folder of a built table or of shards, complete or not."""
    names = (RECORD, "shard-00000/meta.json", "shards.json")  # the last one is of older versions
    if not isinstance(source, str | Path):
        return False
    try:
        folder = Path(source)
        return any((folder / name).is_file() for name in names) or _is_shard(folder)
    except OSError:  # a text that is too long for a path
        return False


def _is_shard(folder: Path) -> bool:
    return folder.name.startswith("shard-") and (folder.parent / RECORD).is_file()


def is_sharded(source: Any) -> bool:
    """Whether ``source`` is the path of a folder of several shards."""
    return is_saved(source) and (Path(source) / "shard-00001").is_dir()


def open_saved(folder: Path, reward: Any, dtype: torch.dtype) -> tuple[TensorDict, Description]:
    """The table and the description of a folder of one shard, or of one shard of a folder.

    Raises ``DatasetError`` with one sentence: a folder of several shards, an incomplete or damaged
    one, another ``dtype``, or another reward map where rewards were mapped by the build.
    """
    alone = _is_shard(folder)
    log = local_log(folder.parent if alone else folder)
    description, shards = log.description, log.shards
    if alone:
        number = [shard.folder for shard in shards].index(folder.name)
        first = sum(shard.episodes for shard in shards[:number])
        own, shards = slice(first, first + shards[number].episodes), shards[number : number + 1]
        description = replace(
            description,
            episode_returns=description.episode_returns[own],
            episode_lengths=description.episode_lengths[own],
        )
    if len(shards) > 1:
        raise DatasetError(
            f"{folder}: a folder of shards, whose rows are not loaded at once; open it with "
            f"iql_torchrl.data.load_shards({str(folder)!r})."
        )
    stored = log.layout[REWARD].dtype
    if stored != dtype:
        raise DatasetError(
            f"{folder}: was built with dtype={stored} and dtype={dtype} is asked for; pass "
            f"dtype={stored}, or build it again."
        )
    change = asked_map(reward, description, str(folder))
    try:
        table = load_rows(folder if alone else folder / shards[0].folder)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error
    table = mapped(table, description.reward_map, change)
    return table, replace(description, reward_map=change)


def asked_map(reward: Any, description: Description, name: str) -> RewardMap:
    """The map that ``reward`` asks for, of stored rewards that have the map of ``description``.

    Raises ``DatasetError`` where that is another map and the stored rewards are not raw.
    """
    stored = description.reward_map
    try:
        change = reward_map(reward, description.episode_returns)
    except ValueError as error:
        raise DatasetError(f"{name}: {error}") from None
    if change != stored and stored != RewardMap():
        raise DatasetError(
            f"{name}: its rewards were mapped with reward={stored.scale, stored.shift} when it was "
            f"built, and reward={reward!r} is another map; pass the first, or build it with raw "
            "rewards, to which any map can be applied."
        )
    return change


def mapped(table: TensorDict, stored: RewardMap, change: RewardMap) -> TensorDict:
    """The table with rewards mapped by ``change``, in memory; itself where they are so stored."""
    if change == stored:
        return table
    table = table.clone(recurse=False)
    raw = table[REWARD]
    table[REWARD] = change.forward(raw.double()).to(raw.dtype)
    return table


def dataset_fields(
    description: Description, env: EnvLike | None, reference_scores: Any
) -> dict[str, Any]:
    """The fields of a ``DatasetSummary``; issues the warnings, at the caller of the caller."""
    for text in description.warnings:
        warnings.warn(text, DatasetWarning, stacklevel=3)
    maker = None if env is None else env_maker(env)
    if maker is None and description.env_spec is not None:
        maker = recorded_env_maker(description.env_spec)
    if maker is not None and description.joined:
        maker = joined_env_maker(maker, description.joined)
    scores = known_scores(reference_scores) or description.reference_scores
    names = ("name", "observation_space", "action_space", "statistics", "episode_returns",
             "episode_lengths", "reward_map", "notes")  # fmt: skip
    fields = {name: getattr(description, name) for name in names}
    return fields | {"env": maker, "reference_scores": scores}
