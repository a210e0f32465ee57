"""Small tables of steps, built in memory, and what is read from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from iql_torchrl.data import OfflineDataset, load_dataset

Arrays = dict[str, Any]


def drift(
    lengths: Sequence[int], width: int = 3, seed: int = 0, *, successors: bool = True
) -> tuple[Arrays, np.ndarray]:
    """Random walks of the given lengths from random places, without marks, and their ends."""
    rng = np.random.default_rng(seed)
    walks = [
        10 * rng.standard_normal(width) + np.cumsum(0.1 * rng.standard_normal((n + 1, width)), 0)
        for n in lengths
    ]
    rows = sum(lengths)
    ends = np.isin(np.arange(rows), np.cumsum(lengths) - 1)
    data = {
        "observation": np.concatenate([walk[:-1] for walk in walks]),
        "next_observation": np.concatenate([walk[1:] for walk in walks]),
        "action": rng.uniform(-1, 1, (rows, 2)),
        "reward": rng.standard_normal(rows),
    }
    data = {key: values.astype(np.float32) for key, values in data.items()}
    if not successors:
        del data["next_observation"]
    return data | {"terminated": ends & False, "truncated": ends & False}, ends


def table() -> Arrays:
    """A clean table: three episodes of five steps, of which the first terminates."""
    data, ends = drift([5, 5, 5])
    first = np.arange(15) < 5
    return data | {"terminated": ends & first, "truncated": ends & ~first}


def walk(*lengths: int) -> tuple[Arrays, np.ndarray]:
    """Rows whose observation counts on within an episode and leaps between them, and their ends."""
    rows = np.concatenate([np.arange(n) + 100.0 * i for i, n in enumerate(lengths)])
    data = {
        "observations": rows[:, None].astype(np.float32),
        "actions": np.linspace(-1, 1, len(rows), dtype=np.float32)[:, None],
        "rewards": rows.astype(np.float32),
        "terminals": np.zeros(len(rows), bool),
    }
    return data, np.isin(np.arange(len(rows)), np.cumsum(lengths) - 1)


def flag(dataset: OfflineDataset, name: str) -> list[int]:
    """The rows with a mark."""
    return dataset.transitions["next", name].flatten().nonzero().flatten().tolist()


def warned(data: Arrays, **options: Any) -> list[str]:
    """The warnings of ``load_dataset``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_dataset(data, **options)
    return [str(w.message) for w in caught]
