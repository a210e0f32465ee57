"""Datasets that this package makes itself."""

from iql_torchrl.data.builtin.catalogue import (
    BUILTIN,
    OGBENCH_LOCAL,
    ensure_dataset,
    ensure_source,
    make_dataset,
)

__all__ = [
    "BUILTIN",
    "OGBENCH_LOCAL",
    "ensure_dataset",
    "ensure_source",
    "make_dataset",
]
