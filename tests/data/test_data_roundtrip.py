"""Every step of every built-in log is in the transitions, once and equal."""

from __future__ import annotations

import minari
import numpy as np
import pytest
import torch

from iql_torchrl import load_dataset
from iql_torchrl.data.builtin import BUILTIN, make_dataset

NEEDS = {"pointmaze": "gymnasium_robotics", "icu-sepsis": "icu_sepsis"}
EPISODES = {"pointmaze/umaze-v0": 2, "pointmaze/medium-v0": 2}


@pytest.mark.filterwarnings("default")  # what an optional package says on import is its own affair
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "pointmaze/medium-v0" else n for n in BUILTIN],
)
def test_round_trip(name, tmp_path, monkeypatch):
    package = NEEDS.get(name.split("/")[0])
    if package:
        pytest.importorskip(package)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    make_dataset(name, episodes=EPISODES.get(name, 5), progress=False)
    data = load_dataset(name).transitions
    row = 0
    for number, episode in enumerate(minari.load_dataset(name).iterate_episodes()):
        rows = data[row : row + len(episode)]
        assert (rows["collector", "traj_ids"] == number).all()
        for key, values in leaves(episode.observations).items():
            if key[-1:] == ("action_mask",):
                continue
            path = ("observation", *key) if key else "observation"
            equal(rows[path], values[:-1])
            equal(rows["next"][path], values[1:])
        equal(rows["action"], episode.actions)
        for key, values in (
            ("reward", episode.rewards),
            ("terminated", episode.terminations),
            ("truncated", episode.truncations),
        ):
            equal(rows["next", key].squeeze(-1), values)
        row += len(episode)
    assert row == len(data)


def leaves(observations, path=()) -> dict[tuple[str, ...], np.ndarray]:
    if not isinstance(observations, dict):
        return {path: observations}
    result = {}
    for name, values in observations.items():
        result |= leaves(values, (*path, name))
    return result


def equal(ours: torch.Tensor, logged: np.ndarray) -> None:
    expected = torch.as_tensor(np.asarray(logged)).to(ours.dtype)
    assert torch.equal(ours, expected.reshape(ours.shape))
