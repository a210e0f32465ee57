"""Sampling of windows on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iql_torchrl import load_dataset


@pytest.mark.gpu
def test_a_sampler_on_a_gpu_does_not_wait_for_it() -> None:
    steps = np.arange(11, dtype=np.float32)
    table = {
        "observation": {
            "vector": np.stack([steps, -steps], 1),
            "camera": (steps[:, None, None, None] + np.arange(24).reshape(4, 2, 3)).astype(
                np.uint8
            ),
        },
        "action": np.linspace(-1, 1, 11, dtype=np.float32)[:, None],
        "reward": steps,
        "terminated": np.isin(steps, (5, 9, 10)),
        "truncated": np.zeros(11, bool),
    }
    windows = load_dataset(table).windows(3)
    sampler = windows.device_sampler(8, "cuda", seed=0)
    rows = sampler.indices()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = sampler.gather(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (batch.cpu() == windows[rows.cpu()].exclude("collector")).all()
