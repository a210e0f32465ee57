"""Task: the description of the data for networks, and that a file restores it exactly."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import log

from iql_torchrl import load_dataset
from iql_torchrl.agent.task import Task, space_from_state, space_state
from iql_torchrl.data import ObservationStatistics
from iql_torchrl.data.digests import episode_digests


def stored(state):
    """What comes back from a file that may hold plain data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SPACES = [
    spaces.Box(-np.inf, np.inf, (3,), np.float32),
    spaces.Box(-0.1, 1 / 3, (2, 2), np.float64),
    spaces.Box(np.array([-np.inf, 0.1]), np.array([1 / 3, np.inf]), dtype=np.float64),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(0, 2**64 - 1, (1,), np.uint64),
    spaces.Discrete(5),
    spaces.Discrete(5, start=-3),
    spaces.MultiDiscrete([3, 4], dtype=np.int32, start=[1, -2]),
    spaces.MultiDiscrete([[3, 4], [5, 6]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.Dict({"b": spaces.Box(-1, 1, (2,)), "a": spaces.Dict({"c": spaces.Discrete(3)})}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_come_back_exactly(space):
    result = space_from_state(stored(space_state(space)))
    assert result == space
    assert result.dtype == space.dtype
    if isinstance(space, spaces.Box):
        for one, other in ((result.low, space.low), (result.high, space.high)):
            assert one.tobytes() == other.tobytes()
    if isinstance(space, spaces.Dict):
        assert list(result.spaces) == list(space.spaces)


def test_a_task_has_what_networks_need_and_is_restored_from_its_state():
    data = replace(load_dataset(log()), name="log", reference_scores=(-1.5, 1 / 3))
    task = Task.of(data)
    np.testing.assert_array_equal(task.episodes, np.sort(episode_digests(data)))
    state = task.state_dict()
    result = Task.from_state_dict(stored(state))
    for name in ("observation_space", "action_space", "observation_spec", "action_spec"):
        assert getattr(result, name) == getattr(data, name)
    assert (result.masked, result.dtype, result.name) == (False, torch.float32, "log")
    assert result.reference_scores == (-1.5, 1 / 3)
    ((key, actual),) = result.statistics.items()
    expected = data.statistics[key]
    assert torch.equal(actual.mean, expected.mean)
    assert torch.equal(actual.std, expected.std)
    assert (actual.constant, actual.count) == (expected.constant, 40)
    np.testing.assert_array_equal(result.episodes, task.episodes)
    assert result.episodes.dtype == np.int64
    old = {k: v for k, v in state.items() if k != "episodes"}
    for without in (old, Task(*SPACES[:2]).state_dict()):
        assert Task.from_state_dict(stored(without)).episodes is None
    with pytest.raises(ValueError, match=r"stored with \['colour'\]"):
        Task.from_state_dict({**state, "colour": 1})
    with pytest.raises(ValueError, match=r"without \['masked'\]"):
        Task.from_state_dict({k: v for k, v in state.items() if k != "masked"})


def test_specs_count_from_zero():
    inner = spaces.Dict({"kind": spaces.Discrete(3, start=2), "x": spaces.Box(-1, 1, (2,))})
    task = Task(inner, spaces.Discrete(4, start=1))
    assert task.action_spec.space.n == 4
    assert task.observation_spec["observation", "kind"].space.n == 3
    assert task.observation_spec["observation", "x"].shape == (2,)


def test_a_statistic_of_a_wide_log_does_not_carry_the_log():
    mean = torch.arange(1000.0)[:3]
    statistics = {"observation": ObservationStatistics(mean, mean + 1, (), 9)}
    task = Task(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), statistics)
    stored_mean = task.state_dict()["statistics"][0]["mean"]
    assert stored_mean.untyped_storage().nbytes() == 12


def test_a_space_without_a_stored_form_is_refused():
    with pytest.raises(ValueError, match="Text space cannot be stored; expected Box"):
        space_state(spaces.Text(3))
    with pytest.raises(ValueError, match="type 'Blob'"):
        space_from_state({"type": "Blob"})
