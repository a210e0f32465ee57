"""Which reader opens a source, and the files that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import minari
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    columns_of_tensordict,
    flatten,
    group_numbered,
    hdf5_arrays,
    hdf5_parts,
    open_npz,
)
from iql_torchrl.data.readers.csv_files import open_csv
from iql_torchrl.data.readers.d3rlpy import open_d3rlpy_buffer, open_d3rlpy_file
from iql_torchrl.data.readers.episodes import table_source
from iql_torchrl.data.readers.frames import is_frame, open_frame
from iql_torchrl.data.readers.huggingface import (
    HuggingFaceRows,
    is_saved_dataset,
    is_table_of_datasets,
    load_saved_dataset,
)
from iql_torchrl.data.readers.json_files import open_json, open_npy
from iql_torchrl.data.readers.minari import find_minari, minari_files, minari_source
from iql_torchrl.data.readers.ogbench import is_ogbench, ogbench_files, open_ogbench
from iql_torchrl.data.readers.source import ReadOptions, Source, chain, concatenated, limited
from iql_torchrl.data.readers.torchrl_datasets import open_torchrl_dataset
from iql_torchrl.data.saved import is_saved
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


def open_source(source: Any, options: ReadOptions) -> Source:
    """What ``load_dataset`` reads, with joined leaves and at most ``limit`` rows."""
    table = _open(source, options)
    if options.concatenate:
        table = concatenated(table, options.concatenate)
    return limited(table, options.limit)


def source_files(source: Any, options: ReadOptions) -> tuple[Path, ...]:
    """Every file that the source reads; empty if any part of it is in memory."""
    if isinstance(source, list | tuple):
        parts = [source_files(item, options) for item in source]
        return tuple(path for part in parts for path in part) if all(parts) else ()
    if isinstance(source, str | Path) and is_table_path(path := Path(source)):
        if path.is_dir():
            return tuple(sorted(p for p in path.rglob("*") if p.is_file()))
        others: tuple[Path, ...] = ()
        with suppress(DatasetError):  # of a damaged file, which is refused when it is read
            if path.suffix.lower() in (".hdf5", ".h5") and path.is_file():
                others = hdf5_parts(path, hdf5_arrays(path))
        return (path, *others) if path.is_file() else ()
    if is_ogbench(source):
        return ogbench_files(source)
    if isinstance(source, str):
        source = find_minari(source, download=options.download)
    return minari_files(source) if isinstance(source, minari.MinariDataset) else ()


def _open(source: Any, options: ReadOptions) -> Source:
    if isinstance(source, list | tuple):
        return chain([_open(item, options) for item in source])
    if isinstance(source, minari.MinariDataset):
        return minari_source(source, options)
    if is_saved(source):
        raise DatasetError(f"{source}: a built table is loaded alone, not in a list of sources.")
    if isinstance(source, str | Path) and is_table_path(source):
        options = options.described()
        return table_source(_open_path(Path(source), options), options)
    if isinstance(source, Path):
        raise DatasetError(
            f"{source}: expected a file of one of the kinds {', '.join(TABLE_FILES)}, a folder of "
            "Parquet files, of LeRobot or of datasets.save_to_disk, or a Minari id as text."
        )
    if is_ogbench(source):
        return table_source(open_ogbench(source), options)
    if isinstance(source, str):
        return minari_source(find_minari(source, download=options.download), options)
    options = options.described()
    return table_source(_open_object(source, options), options)


def is_table_path(source: str | Path) -> bool:
    """Whether a path or text names a file or folder that is a table of steps."""
    path = Path(source)
    if path.suffix.lower() in TABLE_FILES:
        return True
    # os.path: a text may be too long for a path.
    return os.path.isdir(source) and (
        (path / "meta" / "info.json").is_file()  # of LeRobot
        or is_saved_dataset(path)
        or next(path.rglob("*.parquet"), None) is not None
    )


def _open_path(path: Path, options: ReadOptions) -> Columns:
    """The columns of a file, or of a folder of LeRobot, of ``save_to_disk`` or of Parquet files."""
    kind = path.suffix.lower()
    if not path.exists():
        raise DatasetError(f"{path}: no such file.")
    if not path.is_dir() and kind != ".parquet":
        if kind in FILES:
            columns = FILES[kind](path, options.named)
            if not isinstance(columns, Columns):
                columns = Columns(path.name, columns)
            return replace(columns, columns=group_numbered(columns.columns, columns.name))
        return open_d3rlpy_file(path, options)
    from iql_torchrl.data.readers.arrow import arrow_columns
    from iql_torchrl.data.readers.lerobot import lerobot_columns
    from iql_torchrl.data.readers.parquet import ParquetRows, parquet_files

    if is_saved_dataset(path):
        rows = HuggingFaceRows(load_saved_dataset(path), path)
        return Columns(path.name, arrow_columns(rows, options.named))
    if (path / "meta" / "info.json").is_file():
        return Columns(path.name, lerobot_columns(path, options.named))
    files, folder = ([path], path.parent) if path.is_file() else (parquet_files(path), path)
    table = ParquetRows(path.name, files, folder)
    return Columns(path.name, arrow_columns(table, options.named))


def _open_object(source: Any, options: ReadOptions) -> Columns:
    """The columns of an object in memory."""
    name = type(source).__name__
    if isinstance(source, TensorDictBase | ReplayBuffer | Storage):
        columns = columns_of_tensordict(source)
        return open_torchrl_dataset(source, columns, options.named) or Columns(name, columns)
    if is_table_of_datasets(source):
        from iql_torchrl.data.readers.arrow import arrow_columns

        return Columns(name, arrow_columns(HuggingFaceRows(source), options.named))
    if is_frame(source):
        return open_frame(source, options.named)
    if isinstance(source, Mapping):
        return Columns("arrays", flatten(source))
    if (opened := open_d3rlpy_buffer(source)) is None:
        raise DatasetError(
            f"source: {name} cannot be read; expected a Minari or OGBench id, a path, a dict of "
            "arrays, a TensorDict, a TorchRL or d3rlpy buffer, a datasets.Dataset, or a DataFrame."
        )
    return opened
