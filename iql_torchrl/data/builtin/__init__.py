"""Datasets that this package makes itself."""

from iql_torchrl.data.builtin.catalogue import BUILTIN, ensure_dataset, make_dataset

__all__ = [
    "BUILTIN",
    "ensure_dataset",
    "make_dataset",
]
