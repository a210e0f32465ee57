"""Small tables of transitions as Parquet files, written by pyarrow with given types."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (4, 2, 5)
#: Step n of episode t has the observation 100 t + n.
STEPS = np.concatenate([100.0 * t + np.arange(n) for t, n in enumerate(LENGTHS)])
LAST = np.cumsum(LENGTHS) - 1


def steps() -> dict[str, Any]:
    """One row a step; the second episode terminates."""
    return {
        "observation": np.stack([STEPS, -STEPS], 1).astype(np.float32).tolist(),
        "action": np.linspace(-1, 1, 11, dtype=np.float32)[:, None].tolist(),
        "reward": (STEPS % 100).tolist(),
        "terminated": (STEPS == 101).tolist(),
        "episode_index": np.repeat(np.arange(3), LENGTHS).tolist(),
    }


def episodes(*, after_the_last: bool = False) -> dict[str, Any]:
    """One row an episode, as Decision Transformer's published tables have them."""
    rows: dict[str, Any] = {"observations": [], "actions": [], "rewards": [], "dones": []}
    for number, length in enumerate(LENGTHS):
        observed = 100.0 * number + np.arange(length + after_the_last)
        rows["observations"].append(np.stack([observed, -observed], 1).tolist())
        rows["actions"].append(np.linspace(-1, 1, length)[:, None].tolist())
        rows["rewards"].append(np.arange(float(length)).tolist())
        rows["dones"].append(((np.arange(length) == length - 1) & (number == 1)).tolist())
    return rows


def write(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def png(values: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(values).save(data, "png")
    return data.getvalue()
