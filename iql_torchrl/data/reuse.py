"""A memory-mapped dataset that is reused while its source and the options stay the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from tensordict import TensorDict

from iql_torchrl.data.dataset import Description
from iql_torchrl.data.digests import digest
from iql_torchrl.data.readers.opening import source_files
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import open_source
from iql_torchrl.data.saved import (
    RECORD,
    Location,
    SavedDataset,
    is_sharded,
    read_record,
    write_dataset,
)
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.files import folder_lock, make_folder

#: A file up to ``WHOLE`` bytes is digested completely; of a larger one so many chunks of so many
#: bytes are. Many files share these numbers.
WHOLE = 16 * 2**20
CHUNKS, CHUNK = 64, 64 * 2**10


def load_or_build(
    source: Any, folder: Path, options: ReadOptions
) -> tuple[TensorDict, Description]:
    """Return the dataset in ``folder`` if it was built from the same source and options, else build it.

    Other processes and threads that use the folder wait meanwhile (see ``folder_lock``), so that they
    cannot replace the dataset before it is returned.
    """
    built_from = identity(source, options)
    if not os.path.isdir(folder):  # one that is there may be opened without the right to write
        make_folder("memmap", folder, above=True, error=DatasetError)
    folder = folder.resolve()  # a link stays one
    with folder_lock(folder):
        saved = _reusable(folder, built_from)
        if saved is None:
            make_folder("memmap", folder, above=True, error=DatasetError)
            opened = open_source(source, options)
            edges = np.array([0, len(opened.episode_lengths)])
            saved = write_dataset(opened, folder, edges, options, built_from)
        return saved.load(saved.description.reward_map)


def _reusable(folder: Path, built_from: dict[str, Any]) -> SavedDataset | None:
    """The dataset in ``folder`` if it was built from the same; None if it is to be built.

    Raises ``DatasetError`` if the folder contains anything else, which is never overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    saved = None
    if (folder / RECORD).is_file() and not is_sharded(folder):
        try:
            saved = read_record(Location(str(folder)))
            saved.check(contents=False)
        except DatasetError:
            return None  # Written by another version, or damaged: it is built again.
    if saved is None or saved.source is None:
        raise DatasetError(
            f"memmap={folder}: exists and was not made by load_dataset; choose another path."
        )
    return saved if built_from["files"] and saved.source == built_from else None


def identity(source: Any, options: ReadOptions) -> dict[str, Any]:
    """Everything that a dataset depends on: size, time and content of each file, and the options.

    Of a file larger than 16 MiB the digest is of 64 chunks of 64 KiB at even distances, so that a file
    of any size is digested in milliseconds; a change between them is noticed by size and time only.
    Each of n files gets an n-th of both numbers, but at least one chunk and 3 chunks. Without files
    (data in memory) a dataset is never reused.
    """
    files = source_files(source, options)
    records = [
        [str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns, digest(_sampled(p, len(files)))]
        for p in files
    ]
    # Of an environment the limit and the spaces decide, which may change under its id.
    decisive = {
        **vars(options), "env": None,
        "observation_space": _space_identity(options.observation_space),
        "action_space": _space_identity(options.action_space),
        "source": _source_identity(source),
        "download": None, "progress": None,  # these decide nothing
    }  # fmt: skip
    return {"files": records, "options": {name: repr(value) for name, value in decisive.items()}}


def _source_identity(source: Any) -> Any:
    """Names and paths, and which episodes of a Minari dataset, in the lists that the source has."""
    if isinstance(source, list | tuple):
        return [_source_identity(part) for part in source]
    if isinstance(source, minari.MinariDataset) and len(source) != source.storage.total_episodes:
        return digest([str(list(map(int, source.episode_indices))).encode()])
    return source if isinstance(source, str | Path) else None


def _sampled(path: Path, files: int) -> Iterator[bytes]:
    size, chunks = path.stat().st_size, max(CHUNKS // files, 3)
    whole = size <= max(WHOLE // files, CHUNK)
    places = [(size - CHUNK) * number // (chunks - 1) for number in range(chunks)]
    with path.open("rb", buffering=0) as file:
        for place in range(0, size, CHUNK) if whole else places:
            file.seek(place)
            yield file.read(CHUNK)


def _space_identity(space: gym.Space[Any] | None) -> str:
    """The text of a space, with a digest of its bounds, because the text shortens them."""
    if isinstance(space, gym.spaces.Dict):
        return str({key: _space_identity(inner) for key, inner in space.spaces.items()})
    if isinstance(space, gym.spaces.Box):
        return f"{space} {digest([space.low.tobytes(), space.high.tobytes()])}"
    return str(space)
