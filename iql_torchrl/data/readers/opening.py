"""Which reader opens a file, a folder or an object that is a table of steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.readers.arrays import (
    Column,
    Opened,
    columns_of_tensordict,
    flatten,
    hdf5_parts,
    open_npz,
)
from iql_torchrl.data.readers.csv_files import open_csv
from iql_torchrl.data.readers.d3rlpy import open_d3rlpy_buffer, open_d3rlpy_file
from iql_torchrl.data.readers.huggingface import (
    HuggingFaceRows,
    is_saved_dataset,
    is_table_of_datasets,
    load_saved_dataset,
)
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.readers.torchrl_datasets import open_torchrl_dataset
from iql_torchrl.data.schema import DatasetError

#: What reads the columns of a file, by its suffix.
FILES: dict[str, Callable[[Path], dict[str, Column]]] = {".npz": open_npz, ".csv": open_csv}
#: Suffixes of the files that contain a table.
TABLE_FILES = (".hdf5", ".h5", ".parquet", *FILES)


def is_table_path(source: str | Path) -> bool:
    """Whether a path or text names a file or folder that :func:`open_path` reads."""
    path = Path(source)
    if path.suffix.lower() in TABLE_FILES:
        return True
    # os.path: a text may be too long for a path.
    return os.path.isdir(source) and (
        (path / "meta" / "info.json").is_file()  # of LeRobot
        or is_saved_dataset(path)
        or next(path.rglob("*.parquet"), None) is not None
    )


def table_path_files(path: Path) -> tuple[Path, ...]:
    """Every file that :func:`open_path` reads; empty where the path does not exist."""
    if path.is_dir():
        return tuple(sorted(p for p in path.rglob("*") if p.is_file()))
    if not path.is_file():
        return ()
    return (path, *hdf5_parts(path)) if path.suffix.lower() in (".hdf5", ".h5") else (path,)


def open_path(path: Path, options: ReadOptions) -> Opened:
    """The columns of a file, or of a folder of LeRobot, of ``save_to_disk`` or of Parquet files.

    Raises ``DatasetError`` naming a missing or damaged file, or the package to install.
    """
    kind = path.suffix.lower()
    if not path.exists():
        raise DatasetError(f"{path}: no such file.")
    if not path.is_dir() and kind != ".parquet":
        if kind in FILES:
            return Opened(path.name, FILES[kind](path), text=kind == ".csv")
        return open_d3rlpy_file(path, options)
    from iql_torchrl.data.readers.arrow import ParquetRows, arrow_columns, parquet_files
    from iql_torchrl.data.readers.lerobot import lerobot_columns

    if is_saved_dataset(path):
        rows = HuggingFaceRows(load_saved_dataset(path), path)
        return Opened(path.name, arrow_columns(rows, options.columns))
    if (path / "meta" / "info.json").is_file():
        return Opened(path.name, lerobot_columns(path, options.columns))
    files, folder = ([path], path.parent) if path.is_file() else (parquet_files(path), path)
    table = ParquetRows(path.name, files, folder)
    return Opened(path.name, arrow_columns(table, options.columns))


def open_object(source: Any, options: ReadOptions) -> Opened | None:
    """The columns of an object in memory; None for an object that is no table."""
    name = type(source).__name__
    if isinstance(source, TensorDictBase | ReplayBuffer | Storage):
        columns = columns_of_tensordict(source)
        return open_torchrl_dataset(source, columns, options.columns) or Opened(name, columns)
    if is_table_of_datasets(source):
        from iql_torchrl.data.readers.arrow import arrow_columns

        return Opened(name, arrow_columns(HuggingFaceRows(source), options.columns))
    if isinstance(source, Mapping):
        return Opened("arrays", flatten(source))
    return open_d3rlpy_buffer(source)
