"""Tables of Hugging Face's package ``datasets``: objects, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = [
    "HuggingFaceRows",
    "HuggingFaceTable",
    "is_saved_dataset",
    "is_table_of_datasets",
    "load_saved_dataset",
]


class HuggingFaceTable(Protocol):
    """What a ``datasets.Dataset`` has; the package has no base class that could be named here."""

    @property
    def column_names(self) -> list[str]: ...


class HuggingFaceRows:
    """The rows of a ``datasets.Dataset`` in its own order, which ``select`` or ``shuffle`` may set.

    Only the columns and rows that are asked for are read; a dataset on disk stays memory-mapped. Its
    format (``with_format``) is not applied.
    """

    def __init__(self, dataset: Any, name: str, folder: Path | None = None) -> None:
        self.name, self.folder = name, folder
        self.rows = len(dataset)
        self.schema = dataset.features.arrow_schema
        self._columns = {
            column: dataset.select_columns([column]).with_format("arrow")
            for column in dataset.column_names
        }

    def read(self, column: str, start: int, stop: int) -> Any:
        return self._columns[column][start:stop].column(column)


def is_table_of_datasets(source: Any) -> bool:
    """Whether ``source`` is a ``datasets.Dataset``, which is not imported.

    Raises ``DatasetError`` for a ``DatasetDict`` and for streams, naming what to pass.
    """
    datasets = sys.modules.get("datasets")
    if datasets is None or not hasattr(datasets, "DatasetDict"):
        return False
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        names = ", ".join(repr(str(name)) for name in source)
        raise DatasetError(
            f"{type(source).__name__}: holds the splits {names}; pass one of them, such as "
            f"source[{next(iter(source), 'train')!r}]."
        )
    if isinstance(source, datasets.IterableDataset):
        raise DatasetError(
            "IterableDataset: a stream has no number of rows; load it without streaming=True, and "
            "pass the Dataset."
        )
    return isinstance(source, datasets.Dataset)


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder, of one table or of several splits."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved_dataset(folder: Path) -> Any:
    """The ``datasets.Dataset`` of a folder that ``save_to_disk`` wrote, memory-mapped.

    Raises ``DatasetError``: the folder has several splits or is damaged, or ``datasets`` is missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DatasetError(
            f"{folder}: holds the splits {', '.join(splits) or 'of no table'}; pass the folder of one "
            f"of them, such as {folder / (splits[0] if splits else 'train')}."
        )
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            f"{folder}: needs the package datasets ({one_line(error)}): "
            'pip install "iql_torchrl[readers]"'
        ) from error
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the package raises errors of many kinds for damaged folders
        raise DatasetError(
            f"{folder}: cannot be read as a folder that save_to_disk wrote "
            f"({type(error).__name__}: {one_line(error)}); copy or save it again."
        ) from error
