"""Datasets on disk: one format for memory-mapped datasets and for shards, written whole and verified.

A folder has ``RECORD`` (everything but the transitions, and the size and digest of each file),
``EPISODES`` (returns and lengths of all episodes) and one folder for each shard of consecutive whole
episodes, with a file for each entry. ``load_dataset(memmap=FOLDER)`` writes a dataset of one shard. A
folder is opened without its source, on any machine. Only the files that the record names are read.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from fsspec.core import url_to_fs
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space, serialize_space
from numpy.typing import NDArray
from tensordict import MemoryMappedTensor, TensorDict

from iql_torchrl.data.build import DiskTables, build, file_name, row_bytes
from iql_torchrl.data.codec import Adaptation
from iql_torchrl.data.dataset import Description
from iql_torchrl.data.digests import digest, episode_digests, sketch_of
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import ObservationStatistics, RewardMap, known_scores, reward_map
from iql_torchrl.data.schema import REWARD, DatasetError, Field, Key, Layout
from iql_torchrl.descriptions import one_line
from iql_torchrl.files import FULL, atomic_folder, atomic_write, is_safe_relative_path

RECORD, EPISODES = "built.json", "episodes.npz"
FORMAT = 4  # of ``RECORD``
#: Bytes of a file, and of the transitions of a dataset, that are looked at together.
READ_AT_ONCE, PART_BYTES = 16 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class Location:
    """The folder of a dataset: on this machine, or at an address whose files are copied when needed.

    ``name``: a path, or an address of ``fsspec`` (``s3://``, ``https://``, ...), with the
    ``storage_options`` of its file system. ``cache``: the folder in which copies of an address's files
    stay, by their digests; None deletes each copy when its transitions are in memory.
    """

    name: str
    cache: Path | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return "://" not in self.name

    def read(self, file: str) -> bytes:
        """Return a file's content; raise ``FileNotFoundError``, and ``DatasetError`` for an address."""
        return Path(self.name, file).read_bytes() if self.is_local else self.call("cat_file", file)

    def call(self, method: str, file: str, *arguments: str) -> Any:
        """Call a method of the file system; its errors, of many types, become one sentence."""
        try:
            system, path = url_to_fs(self.name, **self.storage_options)
            return getattr(system, method)(f"{str(path).rstrip('/')}/{file}", *arguments)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise DatasetError(
                f"{self.name}: cannot be read ({type(error).__name__}: {error}); check the "
                "address, the connection, the credentials, and that fsspec's package for this kind of "
                "address is installed (s3fs, gcsfs, ...)."
            ) from error


@dataclass(frozen=True)
class Shard:
    """One shard: its folder, its number of transitions, and a digest of the content of its files."""

    folder: str
    rows: int
    digest: str


@dataclass(frozen=True)
class SavedDataset:
    """What the record of a folder says.

    ``description``: with the reward scaling of the files. ``files``: size and digest of each, by path.
    ``ranges``: smallest and largest number of each entry over all transitions, of rewards before
    any scaling. ``sketch``: see ``digests.sketch_of``. ``source``: the ``identity`` of what the dataset
    was built from; None if the folder is never built again.
    """

    location: Location
    description: Description
    files: Mapping[str, tuple[int, str]]
    shards: tuple[Shard, ...]
    layout: Layout
    ranges: dict[Key, tuple[float, float]]
    sketch: NDArray[np.int64]
    source: dict[str, Any] | None

    def reward_map(self, reward: Any) -> RewardMap:
        """The reward scaling that ``reward`` asks for.

        Raises ``DatasetError`` if it differs from that of the files and these are not raw.
        """
        name, stored = self.location.name, self.description.reward_map
        change = reward_map(reward, self.description.episode_returns, name)
        if change != stored and stored != RewardMap():
            raise DatasetError(
                f"{name}: was built with rewards scaled by reward={stored.scale, stored.shift}, and "
                f"reward={reward!r} is another scaling; pass the first, or build it with raw rewards, "
                "to which any scaling can be applied."
            )
        return change

    def load(self, change: RewardMap) -> tuple[TensorDict, Description]:
        """The memory-mapped transitions of a folder of one shard, and their description."""
        with self.shard(0, change, contents=False) as transitions:
            return transitions, replace(self.description, reward_map=change)

    @contextlib.contextmanager
    def shard(self, number: int, change: RewardMap, *, contents: bool) -> Iterator[TensorDict]:
        """Yield the memory-mapped transitions of a shard, with rewards scaled by ``change``.

        Checks the sizes of the files, and with ``contents`` every byte. Files of this machine stay
        mapped afterwards. Raises ``DatasetError``.
        """
        shard, place = self.shards[number], self.location
        with contextlib.ExitStack() as stack:
            copies = None
            if not place.is_local:
                copies = place.cache or stack.enter_context(tempfile.TemporaryDirectory())
            paths = {
                key: self._file(f"{shard.folder}/{file_name(key)}", copies, contents)
                for key in self.layout
            }
            transitions = _mapped(paths, self.layout, shard.rows)
            if change != self.description.reward_map:
                raw = transitions[REWARD]
                transitions[REWARD] = change.forward(raw.double()).to(raw.dtype)
            yield transitions

    def check(self, *, contents: bool) -> int:
        """Check all files of a folder of this machine; return their number of bytes."""
        for name in self.files:
            self._file(name, None, contents)
        return sum(size for size, _ in self.files.values())

    def _file(self, name: str, copies: str | Path | None, contents: bool) -> Path:
        """The path of a file, or of its copy in the folder ``copies``; checks the size.

        Compares the bytes with the digest if ``contents``, and always those of a new copy.
        """
        place = self.location
        try:
            path = Path(place.name, name) if copies is None else Path(copies, self.files[name][1])
            if copies is None or path.is_file():
                self._check(name, path, contents)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as temporary:
                    place.call("get_file", name, str(temporary))
                    self._check(name, temporary, contents=True)
            return path
        except (FileNotFoundError, KeyError):
            raise damaged(place, f"{name} is missing") from None

    def _check(self, name: str, path: Path, contents: bool) -> None:
        (size, content), actual = self.files[name], path.stat().st_size
        where = "" if self.location.is_local else f" in its copy {path}"
        if actual != size:
            reason = f"{name} has {actual:,} bytes{where}, built with {size:,}"
            raise damaged(self.location, reason)
        if contents and _file_digest(path) != content:
            reason = f"{name} has another content than when it was built{where}"
            raise damaged(self.location, reason)


def _mapped(paths: Mapping[Key, Path], layout: Layout, rows: int) -> TensorDict:
    """Transitions of memory-mapped files, each of exactly ``rows`` rows."""
    entries = {}
    for key, (shape, dtype) in layout.items():
        size = torch.Size((rows, *shape))
        entries[key] = (
            MemoryMappedTensor.from_filename(str(paths[key]), dtype, size)
            if size.numel()
            else torch.empty(size, dtype=dtype)
        )
    return TensorDict({}, batch_size=[rows]).update(entries)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return digest(iter(partial(file.read, READ_AT_ONCE), b""))


# -- writing

#: How the record has each entry of a ``Description`` that is not an array: to JSON, and back.
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "name": (str, str),
    "observation_space": (serialize_space, deserialize_space),
    "action_space": (serialize_space, deserialize_space),
    "env_spec": (lambda spec: spec and spec.to_json(), lambda text: text and EnvSpec.from_json(text)),
    "reference_scores": (known_scores, known_scores),
    "reward_map": (astuple, lambda pair: RewardMap(*pair)),
    "statistics": (
        lambda known: [(key, *vars(each).values()) for key, each in known.items()],
        lambda saved: {
            key if isinstance(key, str) else tuple(key): ObservationStatistics(
                torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64),
                tuple(constant), count,
            )
            for key, mean, std, constant, count in saved
        },
    ),
    "adaptation": (vars, lambda saved: Adaptation(**saved)),
    **dict.fromkeys(("notes", "warnings"), (tuple, tuple)),
}  # fmt: skip


def write_dataset(
    source: Source,
    folder: Path,
    edges: NDArray[np.int64],
    options: ReadOptions,
    built_from: dict[str, Any] | None = None,
) -> SavedDataset:
    """Read ``source`` once, in bounded memory, into a folder that is complete or absent.

    Shard n has the episodes ``edges[n]`` to ``edges[n + 1]``. Raises ``DatasetError`` with the needed
    and the free space if the disk is or becomes full.
    """
    parent = folder.absolute().parent
    needed = int(source.episode_lengths.sum()) * row_bytes(source.layout)
    try:
        if needed > shutil.disk_usage(parent).free:
            raise OSError(errno.ENOSPC, "nothing was written")
        with atomic_folder(folder) as staging:
            _write(source, staging, edges, options, built_from)
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(parent).free
        raise DatasetError(
            f"{folder}: the dataset needs {needed:,} bytes and {free:,} are free on the disk of "
            f"{parent} ({error.strerror}). Make room, choose a folder on another disk, or read less "
            "with limit=. A dataset that exists already stays until the new one is complete."
        ) from error
    return read_record(Location(str(folder)))


def _write(
    source: Source, staging: Path, edges: NDArray[np.int64], options: ReadOptions, built_from: Any
) -> None:
    layout, lengths = source.layout, source.episode_lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first = starts[edges]
    names = [f"shard-{number:05d}" for number in range(len(edges) - 1)]
    shards = list(zip(names, np.diff(first).tolist(), strict=True))
    files = DiskTables(layout, first, [staging / name for name in names])
    _, description = build(source, options, files)
    returns, sketches = description.episode_returns, []
    np.savez(staging / EPISODES, returns=returns, lengths=lengths)
    at_once = max(1, int(PART_BYTES / row_bytes(layout) / lengths.mean()))  # episodes
    for number, (name, rows) in enumerate(shards):
        paths = {key: staging / name / file_name(key) for key in layout}
        for begin in range(edges[number], edges[number + 1], at_once):
            end = min(begin + at_once, edges[number + 1])
            # a mapping for each part: pages of a mapping count as memory of the process
            part = _mapped(paths, layout, rows)[starts[begin] - first[number] :][
                : starts[end] - starts[begin]
            ]
            sketches.append(
                sketch_of(episode_digests(part, returns[begin:end], lengths[begin:end]))
            )
            del part
    record = {
        "format": FORMAT,
        "source": built_from,
        **{name: form(getattr(description, name)) for name, (form, _) in FORMS.items()},
        "shards": shards,
        "files": {
            path.relative_to(staging).as_posix(): (path.stat().st_size, _file_digest(path))
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        },
        "entries": [
            (key, shape, str(dtype).removeprefix("torch."), files.ranges[key])
            for key, (shape, dtype) in layout.items()
        ],
        "sketch": sketch_of(np.concatenate(sketches)),
    }
    (staging / RECORD).write_text(json.dumps(record, default=methodcaller("tolist")))


# -- reading


def read_record(location: Location) -> SavedDataset:
    """Read the record of the dataset at ``location``, and no transitions.

    Raises ``DatasetError`` if the record is absent, of another version, or damaged.
    """
    try:
        record = json.loads(location.read(RECORD))
        if record.get("format") != FORMAT:
            raise DatasetError(
                f"{location.name}: was built by another version of this package; build it again."
            )
        with np.load(io.BytesIO(location.read(EPISODES))) as episodes:
            saved = _parse(location, record, episodes["returns"], episodes["lengths"])
    except FileNotFoundError as error:
        name = EPISODES if EPISODES in str(error) else RECORD
        raise DatasetError(
            f"{location.name}: {name} is missing: not a folder of a built dataset or of shards, an "
            "incomplete one, or one of an older version; copy it again, or build it with python -m "
            "iql_torchrl.data build SOURCE FOLDER [--shards N]."
        ) from None
    except DatasetError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = f"{RECORD} or {EPISODES} cannot be read: {one_line(error)}"
        raise damaged(location, reason) from error
    names = [name for file, (_, digest) in saved.files.items() for name in (file, digest)]
    if outside := [name for name in names if not is_safe_relative_path(name)]:
        raise DatasetError(
            f"{location.name}: it names the file {outside[0]!r}; expected a path below the dataset's "
            "folder. The record is damaged or not from this package: build it again."
        )
    rows, expected = sum(s.rows for s in saved.shards), int(saved.description.episode_lengths.sum())
    if rows != expected:
        raise damaged(location, f"its shards have {rows} transitions in place of {expected}")
    return saved


def _parse(
    location: Location, record: Mapping[str, Any], returns: NDArray[Any], lengths: NDArray[Any]
) -> SavedDataset:
    """What a record says; a damaged one raises any error."""
    entries = {tuple(key): rest for key, *rest in record["entries"]}
    layout = {key: Field(tuple(s), getattr(torch, d)) for key, (s, d, _) in entries.items()}
    files = {name: (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
    described = {name: form(record[name]) for name, (_, form) in FORMS.items()}
    dtype, statistics = layout[REWARD].dtype, described["statistics"]
    described["statistics"] = {key: each.to(dtype) for key, each in statistics.items()}
    shards = []
    for name, rows in record["shards"]:
        inside = {file: c for file, (_, c) in files.items() if file.startswith(f"{name}/")}
        shards.append(Shard(name, rows, digest([json.dumps(inside, sort_keys=True).encode()])))
    return SavedDataset(
        location,
        Description(
            episode_returns=returns,
            episode_lengths=lengths,
            dtype=dtype,
            **described,
        ),
        files,
        tuple(shards),
        layout,
        ranges={key: (low, high) for key, (_, _, (low, high)) in entries.items()},
        sketch=np.array(record["sketch"], np.int64),
        source=record["source"],
    )


def verify(folder: str | Path) -> int:
    """Compare every byte of a dataset on disk with its digest; return the number of bytes.

    About a second per gigabyte. Raises ``DatasetError`` naming the first file that differs.
    """
    return read_record(Location(str(folder))).check(contents=True)


def damaged(location: Location, reason: str) -> DatasetError:
    return DatasetError(
        f"{location.name}: incomplete or damaged ({reason}); copy the folder again, or build it again."
    )


# -- opening as a dataset


def is_saved(source: Any) -> TypeGuard[str | Path]:
    """True if ``source`` is the path of a folder of a built dataset or of shards, complete or not."""
    # the last one is of older versions
    names = (RECORD, "shard-00000/next/reward.memmap", "shards.json")
    # os.path: a text may be too long for a path.
    return isinstance(source, str | Path) and any(os.path.isfile(Path(source, n)) for n in names)


def is_sharded(source: Any) -> bool:
    """True if ``source`` is the path of a folder of several shards."""
    return is_saved(source) and Path(source, "shard-00001").is_dir()


def open_saved(folder: Path, reward: Any, dtype: torch.dtype) -> tuple[TensorDict, Description]:
    """The transitions and the description of a folder of one shard.

    Raises ``DatasetError`` with one sentence: several shards, an incomplete or damaged folder, another
    ``dtype``, or another reward scaling if the build scaled the rewards.
    """
    saved = read_record(Location(str(folder)))
    if len(saved.shards) > 1:
        raise DatasetError(
            f"{folder}: a folder of shards, whose transitions are not loaded at once; open it with "
            f"iql_torchrl.data.load_shards({str(folder)!r})."
        )
    stored = saved.description.dtype
    if stored != dtype:
        raise DatasetError(
            f"{folder}: was built with dtype={stored} and dtype={dtype} is asked for; pass "
            f"dtype={stored}, or build it again."
        )
    return saved.load(saved.reward_map(reward))
