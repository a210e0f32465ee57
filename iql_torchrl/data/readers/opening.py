"""Which reader opens a file, a folder or an object that is a table of steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from iql_torchrl.data.readers.arrays import (
    TABLE_FILES,
    Column,
    Opened,
    flatten,
    hdf5_parts,
    open_npz,
)
from iql_torchrl.data.readers.d3rlpy import open_d3rlpy_buffer, open_d3rlpy_file
from iql_torchrl.data.readers.huggingface import (
    HuggingFaceRows,
    is_saved_dataset,
    is_table_of_datasets,
    load_saved_dataset,
)
from iql_torchrl.data.readers.source import ReadOptions, Source
from iql_torchrl.data.readers.table import table_source
from iql_torchrl.data.readers.tensordict import columns_of_tensordict
from iql_torchrl.data.readers.torchrl_datasets import open_torchrl_dataset
from iql_torchrl.data.schema import DatasetError

__all__ = ["is_table_path", "open_object", "open_path", "opened_source", "table_path_files"]


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
    if path.is_dir():
        return Opened(path.name, _folder_columns(path, options))
    if not path.is_file():
        raise DatasetError(f"{path}: no such file.")
    kind = path.suffix.lower()
    if kind == ".npz":
        return Opened(path.name, open_npz(path))
    if kind == ".parquet":
        from iql_torchrl.data.readers.arrow import ParquetRows, arrow_columns

        table = ParquetRows(path.name, [path], path.parent)
        return Opened(path.name, arrow_columns(table, options.columns))
    return open_d3rlpy_file(path, options)


def _folder_columns(path: Path, options: ReadOptions) -> dict[str, Column]:
    from iql_torchrl.data.readers.arrow import ParquetRows, arrow_columns, parquet_files
    from iql_torchrl.data.readers.lerobot import lerobot_columns

    if is_saved_dataset(path):
        return arrow_columns(HuggingFaceRows(load_saved_dataset(path), path), options.columns)
    if (path / "meta" / "info.json").is_file():
        return lerobot_columns(path, options.columns)
    return arrow_columns(ParquetRows(path.name, parquet_files(path), path), options.columns)


def open_object(source: Any, options: ReadOptions) -> Opened | None:
    """The columns of an object in memory; None for an object that is no table."""
    if isinstance(source, TensorDictBase | ReplayBuffer | Storage):
        name, columns = type(source).__name__, columns_of_tensordict(source)
        return open_torchrl_dataset(source, columns, options.columns) or Opened(name, columns)
    if (opened := open_d3rlpy_buffer(source)) is not None:
        return opened
    if is_table_of_datasets(source):
        from iql_torchrl.data.readers.arrow import arrow_columns

        rows = HuggingFaceRows(source)
        return Opened(rows.name, arrow_columns(rows, options.columns))
    return Opened("arrays", flatten(source)) if isinstance(source, Mapping) else None


def opened_source(opened: Opened, options: ReadOptions) -> Source:
    """``table_source`` of the opened columns, with what their reader says about them."""
    described = replace(
        options,
        observation_space=options.observation_space or opened.observation_space,
        action_space=options.action_space or opened.action_space,
    )
    table = table_source(opened.name, opened.columns, described)
    return replace(
        table,
        env_spec=opened.env_spec,
        notes=(*opened.notes, *table.notes),
        warnings=(*opened.warnings, *table.warnings),
    )
