"""Tables of Hugging Face's package ``datasets``: objects, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from iql_torchrl.data.readers.arrays import package, reading
from iql_torchrl.data.schema import DatasetError


def is_table_of_datasets(source: Any) -> bool:
    """True if ``source`` is an object of ``datasets``, which is not imported."""
    datasets = sys.modules.get("datasets")
    kinds = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return any(isinstance(source, getattr(datasets, kind, ())) for kind in kinds)


class HuggingFaceRows:
    """The rows of a ``datasets.Dataset`` in its own order, which ``select`` or ``shuffle`` may set.

    Only what is asked for is read; a dataset on disk stays memory-mapped. Its format is not applied.
    Raises ``DatasetError`` for several splits, and for a stream.
    """

    def __init__(self, dataset: Any, folder: Path | None = None) -> None:
        self.unreadable: dict[str, str] = {}
        self.name, self.folder = folder.name if folder else type(dataset).__name__, folder
        if isinstance(dataset, dict):
            first = next(iter(dataset), "train")
            raise DatasetError(
                f"{self.name}: holds the splits {', '.join(map(repr, dataset))}; pass one of them, "
                f"such as {folder / first if folder else f'source[{first!r}]'}."
            )
        if not hasattr(dataset, "__len__"):
            raise DatasetError(
                f"{self.name}: a stream has no number of rows; load it without streaming=True, and "
                "pass the Dataset."
            )
        self.rows, self.schema = len(dataset), dataset.features.arrow_schema
        self._columns = {
            column: dataset.select_columns([column]).with_format("arrow")
            for column in dataset.column_names
        }

    def read(self, column: str, start: int, stop: int) -> Any:
        return self._columns[column][start:stop].column(column)


def is_saved_dataset(folder: Path) -> bool:
    """True if ``save_to_disk`` wrote the folder, of one table or of several splits."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved_dataset(folder: Path) -> Any:
    """The object of ``datasets`` that ``save_to_disk`` wrote, memory-mapped.

    Raises ``DatasetError``: the folder is damaged, or ``datasets`` is missing.
    """
    datasets = package("datasets", str(folder))
    # the package raises errors of many kinds for damaged folders
    with reading(folder, "cannot be read as a folder that save_to_disk wrote", Exception):
        return datasets.load_from_disk(str(folder))
