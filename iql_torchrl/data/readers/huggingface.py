"""Tables of Hugging Face's package ``datasets``: objects, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iql_torchrl.data.readers.arrays import Columns, package, reading
from iql_torchrl.data.schema import DatasetError


def is_table_of_datasets(source: Any) -> bool:
    """True if ``source`` is an object of ``datasets``, which is not imported."""
    datasets = sys.modules.get("datasets")
    kinds = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return any(isinstance(source, getattr(datasets, kind, ())) for kind in kinds)


def open_datasets(
    dataset: Any, mapping: Mapping[str, str | None], folder: Path | None = None
) -> Columns:
    """The columns of a ``datasets.Dataset`` in its own order, which ``select`` or ``shuffle`` may set.

    Only what is asked for is read; a dataset on disk stays memory-mapped. Its format is not applied.
    Raises ``DatasetError`` for several splits, and for a stream.
    """
    from iql_torchrl.data.readers.arrow import ArrowRows, arrow_columns

    name = folder.name if folder else type(dataset).__name__
    if isinstance(dataset, dict):
        first = next(iter(dataset), "train")
        raise DatasetError(
            f"{name}: holds the splits {', '.join(map(repr, dataset))}; pass one of them, "
            f"such as {folder / first if folder else f'source[{first!r}]'}."
        )
    if not hasattr(dataset, "__len__"):
        raise DatasetError(
            f"{name}: a stream has no number of rows; load it without streaming=True, and "
            "pass the Dataset."
        )
    columns = {c: dataset.select_columns([c]).with_format("arrow") for c in dataset.column_names}

    def read(column: str, start: int, stop: int) -> Any:
        return columns[column][start:stop].column(column)

    rows = ArrowRows(name, dataset.features.arrow_schema, len(dataset), read, folder)
    return Columns(name, arrow_columns(rows, mapping))


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
