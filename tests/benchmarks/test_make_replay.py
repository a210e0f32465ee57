"""``benchmarks/make_replay.py``, at small size."""

from __future__ import annotations

import make_replay
import numpy as np
import pytest
from extras import needs

from iql_torchrl import load_dataset


def test_the_log_has_every_step_and_the_ends_of_its_episodes(tmp_path):
    needs("mujoco")
    path = tmp_path / "log.npz"
    make_replay.main(
        ["Hopper-v5", str(path), "--steps", "120", "--random-steps", "110", "--width", "8"]
    )
    with np.load(path) as table:
        columns = dict(table)
    ends = columns["terminated"] | columns["truncated"]
    assert columns["obs"].shape == columns["next_obs"].shape == (120, 11)
    assert columns["action"].shape == (120, 3)
    assert ends[-1]
    inside = ~ends[:-1]
    assert np.array_equal(columns["next_obs"][:-1][inside], columns["obs"][1:][inside])
    # Hopper terminates below a height of 0.7 and beyond an angle of 0.2
    height, angle = columns["next_obs"][:, 0], columns["next_obs"][:, 1]
    assert np.array_equal(columns["terminated"], (height <= 0.7) | (np.abs(angle) >= 0.2))
    assert columns["terminated"].sum() >= 2
    dataset = load_dataset(path, env="Hopper-v5", progress=False)
    assert len(dataset.episode_returns) == ends.sum()
    with pytest.raises(SystemExit):
        make_replay.main(["Hopper-v5", "log.csv"])
