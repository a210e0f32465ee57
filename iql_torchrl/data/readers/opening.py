"""Which reader opens a source, and the files that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import minari
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    flatten,
    hdf5_arrays,
    hdf5_parts,
    open_npz,
)
from iql_torchrl.data.readers.csv_files import open_csv
from iql_torchrl.data.readers.d3rlpy import (
    is_d3rlpy_buffer,
    open_d3rlpy_buffer,
    open_d3rlpy_file,
)
from iql_torchrl.data.readers.frames import is_frame, open_frame, open_table
from iql_torchrl.data.readers.huggingface import (
    is_saved_dataset,
    is_table_of_datasets,
    load_saved_dataset,
    open_datasets,
)
from iql_torchrl.data.readers.json_files import open_json, open_npy
from iql_torchrl.data.readers.minari import find_minari, is_minari_id, minari_files, open_minari
from iql_torchrl.data.readers.ogbench import is_ogbench, ogbench_files, open_ogbench
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.torchrl_datasets import open_torchrl
from iql_torchrl.data.schema import DatasetError

#: What reads the columns of a file, by its suffix.
FILES: dict[str, Callable[[Path, Mapping[str, str | None]], Columns | dict[str, Column]]] = {
    ".npz": lambda path, _: open_npz(path),
    ".npy": lambda path, _: open_npy(path),
    ".csv": lambda path, _: open_csv(path),
    ".tsv": lambda path, _: open_csv(path),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), open_json),
}
#: Suffixes of the files that contain a table.
TABLE_FILES = (".hdf5", ".h5", ".parquet", *FILES)
EXPECTED = (
    f"a file of one of the kinds {', '.join(TABLE_FILES)}, a folder of Parquet files, of LeRobot or of "
    "datasets.save_to_disk, or a Minari id"
)


def open_columns(source: Any, options: ReadOptions) -> Columns:
    """The columns of one source, by their names in it. Raises ``DatasetError`` saying what is read."""
    if isinstance(source, minari.MinariDataset):
        return open_minari(source, options)
    if not isinstance(source, str | Path):
        return _open_object(source, options)
    if is_table_path(source):
        path, kind = Path(source), Path(source).suffix.lower()
        if not path.exists():
            raise DatasetError(f"{path}: no such file.")
        if path.is_dir() or kind == ".parquet":
            return _open_arrow(path, options)
        if kind not in FILES:
            return open_d3rlpy_file(path, options)
        columns = FILES[kind](path, options.named)
        return columns if isinstance(columns, Columns) else Columns(path.name, columns)
    if os.path.lexists(source) and not is_minari_id(source):
        raise DatasetError(
            f"{source}: exists, but is not of a kind that is read; expected {EXPECTED}."
        )
    if isinstance(source, Path):
        raise DatasetError(f"{source}: no such file; expected {EXPECTED} as text.")
    if is_ogbench(source):
        return open_ogbench(source, options)
    return open_minari(find_minari(source, download=options.download), options)


def source_files(source: Any, options: ReadOptions) -> tuple[Path, ...]:
    """Every file that the source reads; empty if any part of it is in memory."""
    if isinstance(source, list | tuple):
        parts = [source_files(item, options) for item in source]
        return tuple(path for part in parts for path in part) if all(parts) else ()
    if isinstance(source, str | Path) and is_table_path(path := Path(source)):
        if path.is_dir():
            return tuple(sorted(p for p in path.rglob("*") if p.is_file()))
        others: tuple[Path, ...] = ()
        with suppress(DatasetError):  # a damaged file is refused when it is read
            if path.suffix.lower() in (".hdf5", ".h5") and path.is_file():
                others = hdf5_parts(path, hdf5_arrays(path))
        return (path, *others) if path.is_file() else ()
    if is_ogbench(source):
        return ogbench_files(source)
    if isinstance(source, str) and (is_minari_id(source) or not os.path.lexists(source)):
        source = find_minari(source, download=options.download)
    return minari_files(source) if isinstance(source, minari.MinariDataset) else ()


def is_table_path(source: str | Path) -> bool:
    """A path or text names a file or folder that is a table of steps."""
    path = Path(source)
    if path.suffix.lower() in TABLE_FILES:
        return True
    # os.path: a text may be too long for a path.
    return os.path.isdir(source) and (
        (path / "meta" / "info.json").is_file()  # of LeRobot
        or is_saved_dataset(path)
        or next(path.rglob("*.parquet"), None) is not None
    )


def _open_arrow(path: Path, options: ReadOptions) -> Columns:
    """The columns of a Parquet file, or of a folder of LeRobot, ``save_to_disk`` or Parquet files."""
    from iql_torchrl.data.readers.arrow import arrow_columns
    from iql_torchrl.data.readers.parquet import hive_table, parquet_files, parquet_rows

    if is_saved_dataset(path):
        return open_datasets(load_saved_dataset(path), options.named, path)
    if (path / "meta" / "info.json").is_file():
        from iql_torchrl.data.readers.lerobot import open_lerobot

        return open_lerobot(path, options)
    files, folder = ([path], path.parent) if path.is_file() else (parquet_files(path), path)
    if any("=" in part for file in files for part in file.relative_to(folder).parts[:-1]):
        return open_table(path.name, hive_table(files, folder), options.named)
    table = parquet_rows(path.name, files, folder)
    return Columns(path.name, arrow_columns(table, options.named))


def _open_object(source: Any, options: ReadOptions) -> Columns:
    """The columns of an object in memory."""
    name = type(source).__name__
    if isinstance(source, TensorDictBase | ReplayBuffer | Storage):
        return open_torchrl(source, options)
    if is_table_of_datasets(source):
        return open_datasets(source, options.named)
    if is_frame(source):
        return open_frame(source, options.named)
    if isinstance(source, Mapping):
        return Columns("arrays", flatten(source))
    if is_d3rlpy_buffer(source):
        return open_d3rlpy_buffer(source, options)
    raise DatasetError(
        f"source: {name} cannot be read; expected a Minari or OGBench id, a path, a dict of "
        "arrays, a TensorDict, a TorchRL or d3rlpy buffer, a datasets.Dataset, or a DataFrame."
    )
