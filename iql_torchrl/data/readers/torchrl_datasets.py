"""TorchRL's own dataset classes: checks their values; corrects faults or reports them.

Seen by running the classes of TorchRL 0.14.1 on small files; ``tests/data/test_data_torchrl.py`` runs
them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Opened, chosen_rows
from iql_torchrl.data.schema import DatasetError

__all__ = ["open_torchrl_dataset"]

#: About how many values are looked at together.
VALUES = 2**22
#: Classes that store a file's merged ``done`` as ``terminated``.
MERGED = ("RobosetExperienceReplay", "GenDGRLExperienceReplay")


def open_torchrl_dataset(
    source: Any, columns: dict[str, Column], mapping: Mapping[str, str | None]
) -> Opened | None:
    """The columns of an instance of a class of ``torchrl.data.datasets``; None for other objects.

    - Every value zero (``MinariExperienceReplay``, which allocates its memory-mapped table again
      after filling it): ``DatasetError``.
    - Zeros as the next observation of ends that do not terminate (``D4RLExperienceReplay``,
      ``OpenXExperienceReplay``, ``VD4RLExperienceReplay``, ``AtariDQNExperienceReplay`` at the end of
      a file): those rows have no known successor and are left out, and the rows before them are
      truncated; with a warning.
    - Rows of zeros at the end of the table (``GenDGRLExperienceReplay``): left out, with a warning.
    - ``terminated`` a copy of the file's ``done``: a warning.
    """
    from torchrl.data.datasets.common import BaseDatasetExperienceReplay

    if not isinstance(source, BaseDatasetExperienceReplay):
        return None
    name = type(source).__name__
    _check_filled(source, name, columns)
    warnings = []
    if name in MERGED and "terminated" not in mapping:
        warnings.append(
            f"{name}: its 'terminated' is a copy of the file's done, so that a time limit reads as a "
            "termination, whose value is not bootstrapped; if episodes end by time, pass "
            "columns={'terminated': None, 'truncated': 'next/done'}."
        )
    keep, text = _rows_with_successors(name, columns, mapping)
    if text is not None:
        warnings.append(text)
        columns = chosen_rows({**columns, **_truncated_before(columns, mapping, keep)}, keep)
    return Opened(name, columns, warnings=tuple(warnings))


def _check_filled(source: Any, name: str, columns: Mapping[str, Column]) -> None:
    """Raises if no column but the marks has a value other than zero."""
    values = [c for path, c in columns.items() if np.dtype(c.dtype).kind in "iuf"]
    if not values or any(not zero.all() for column in values for zero in _zeros([column])):
        return
    advice = "load the original files"
    if name == "MinariExperienceReplay":
        advice = f"load the dataset by its id: load_dataset({source.dataset_id!r})"
    raise DatasetError(
        f"{name}: every value is zero. TorchRL 0.14.1 fills MinariExperienceReplay's table and then "
        f"allocates another, memory-mapped one (memmap_like), so that the values are lost; {advice}."
    )


def _rows_with_successors(
    name: str, columns: Mapping[str, Column], mapping: Mapping[str, str | None]
) -> tuple[NDArray[np.bool_], str | None]:
    """Rows to keep, and a warning on the others; None if all are kept."""
    observed = _group(columns, mapping.get("observation") or "observation")
    following = _group(columns, mapping.get("next_observation") or "next/observation")
    rows = int(next(iter(columns.values())).shape[0])
    keep = np.ones(rows, np.bool_)
    if not observed or not following:
        return keep, None
    empty = np.concatenate(list(_zeros(observed)))
    lost = np.concatenate(list(_zeros(following)))
    used = rows - int((~(empty & lost))[::-1].argmax())
    keep[used:] = False
    # Inside an episode a next observation of zeros is correct if the next row's observation is zero.
    lost[: used - 1] &= ~empty[1:used]
    lost &= ~_terminated(columns, mapping, rows)  # the value of their successor is never used
    keep &= ~lost
    texts = []
    if count := int(lost[:used].sum()):
        texts.append(
            f"{count} rows hold zeros in place of their next observation, as {name} of TorchRL 0.14.1 "
            "writes where a trajectory ends without termination; they are left out, and the row before "
            "each is truncated"
        )
    if used < rows:
        texts.append(f"the last {rows - used} of {rows} rows hold only zeros and are left out")
    return keep, f"{name}: {'; '.join(texts)}." if texts else None


def _truncated_before(
    columns: Mapping[str, Column], mapping: Mapping[str, str | None], keep: NDArray[np.bool_]
) -> dict[str, Column]:
    """The marks of truncation, set also at the rows before those that are left out."""
    path = mapping.get("truncated") or "next/truncated"
    truncated = np.zeros(len(keep), np.bool_)
    if path in columns:
        truncated = np.asarray(columns[path][:]).reshape(len(keep)) != 0
    before = np.flatnonzero(~keep[1:] & keep[:-1])
    truncated[before] |= ~_terminated(columns, mapping, len(keep))[before]
    return {path: truncated}


def _terminated(
    columns: Mapping[str, Column], mapping: Mapping[str, str | None], rows: int
) -> NDArray[np.bool_]:
    path = mapping.get("terminated", "next/terminated")
    if path is None or path not in columns:
        return np.zeros(rows, np.bool_)
    return np.asarray(columns[path][:]).reshape(rows) != 0


def _group(columns: Mapping[str, Column], path: str) -> list[Column]:
    path = path if path in columns else path.replace(".", "/")
    return [c for name, c in columns.items() if name == path or name.startswith(f"{path}/")]


def _zeros(columns: list[Column]) -> Any:
    """Blocks of flags: rows in which all columns are zero."""
    width = max(int(np.prod(column.shape[1:])) for column in columns)
    rows, size = int(columns[0].shape[0]), max(1, VALUES // max(width, 1))
    for start in range(0, rows, size):
        block = np.ones(min(size, rows - start), np.bool_)
        for column in columns:
            values = np.asarray(column[start : start + size])
            block &= ~values.reshape(len(values), -1).any(axis=1)
        yield block
