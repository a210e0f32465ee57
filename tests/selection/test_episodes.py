"""What offline evaluation reads of episodes: returns, discounts and ends, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_mdp import DISCOUNT, random_mdp, uniform

from iql_torchrl import load_dataset
from iql_torchrl.selection.episodes import (
    check_logs,
    episode_numbers,
    first_rows,
    horizon,
    last_rows,
    open_ended,
    powers,
    raw_rewards,
    return_range,
    returns_to_go,
    states,
    terminations,
)


def three_episodes(**options):
    """Of 3, 2 and 1 steps; the first terminates, the second is cut, the third terminates."""
    return load_dataset(
        {
            "observation": np.arange(6) % 2,
            "action": np.zeros(6, int),
            "reward": np.array([1, 2, 4, -1, 3, 5], np.float32),
            "next_observation": np.arange(1, 7) % 2,
            "terminated": np.array([0, 0, 1, 0, 0, 1], bool),
            "truncated": np.array([0, 0, 0, 0, 1, 0], bool),
        },
        **options,
    )


def going_on():
    """The same log, whose first episode already terminates at its second step and goes on."""
    log = three_episodes()
    rows = log.transitions.clone()
    rows["next", "terminated"][1] = True
    return type(log)(**{**vars(log), "transitions": rows})


def test_rows_of_episodes():
    log = three_episodes()
    assert first_rows(log).tolist() == [0, 3, 5]
    assert last_rows(log).tolist() == [2, 4, 5]
    assert episode_numbers(log).tolist() == [0, 0, 0, 1, 1, 2]
    assert terminations(log).tolist() == [False, False, True, False, False, True]
    assert open_ended(log).tolist() == [False, True, False]
    assert open_ended(going_on()).tolist() == [False, True, False]
    assert powers(log, 0.5).tolist() == [1, 0.5, 0.25, 1, 0.5, 1]
    assert powers(log, 0.0).tolist() == [1, 0, 0, 1, 0, 1]
    assert horizon(log, 0.5) == pytest.approx((1.75 + 1.5 + 1) / 3)
    assert horizon(log, 1.0) == 2


def test_returns_to_go_by_hand():
    assert returns_to_go(three_episodes(), 0.5).tolist() == [3, 4, 4, 0.5, 3, 5]
    assert returns_to_go(going_on(), 0.5).tolist() == [2, 2, 4, 0.5, 3, 5]
    mapped = three_episodes(reward=(-7.0, 0.5))
    np.testing.assert_allclose(raw_rewards(mapped), [1, 2, 4, -1, 3, 5], atol=1e-5)
    np.testing.assert_allclose(returns_to_go(mapped, 0.5), [3, 4, 4, 0.5, 3, 5], atol=1e-5)


def test_returns_to_go_against_a_loop():
    log = random_mdp().log(uniform(), episodes=100)
    reward = log.transitions["next", "reward"].squeeze(-1).numpy().astype(float)
    returns, row = returns_to_go(log, DISCOUNT), 0
    for length in log.episode_lengths:
        for step in range(length):
            ahead = reward[row + step : row + length]
            expected = (DISCOUNT ** np.arange(len(ahead)) * ahead).sum()
            assert returns[row + step] == pytest.approx(expected)
        row += length


def test_the_range_of_returns_continues_truncated_episodes_as_they_went():
    # The second episode returns -1 + 1.5 = 0.5 over two steps: 0.5 / (1 - 0.25) in all.
    assert return_range(0.5, three_episodes()) == pytest.approx((0.5 / 0.75, 5))
    assert return_range(0.5, going_on()) == pytest.approx((0.5 / 0.75, 5))
    assert return_range(0.9, three_episodes())[1] == pytest.approx((-1 + 2.7) / (1 - 0.81))
    steps = three_episodes().split(0.34, 0)
    parts = [return_range(0.9, part) for part in steps]
    both = return_range(0.9, *steps)
    assert both == (min(low for low, _ in parts), max(high for _, high in parts))
    closed = load_dataset(
        {
            "observation": np.array([0, 1]),
            "action": np.zeros(2, int),
            "reward": np.array([-4, 3], np.float32),
            "next_observation": np.array([1, 0]),
            "terminated": np.array([False, True]),
            "truncated": np.zeros(2, bool),
        }
    )
    assert return_range(1.0, closed) == (-1, 3)


def test_masks_that_forbid_everything_after_a_termination_become_all_true():
    allowed = np.array([[1, 0], [0, 1], [1, 1]], bool)
    after = np.array([[0, 1], [1, 1], [0, 0]], bool)
    log = load_dataset(
        {
            "observation": np.array([0, 1, 0]),
            "action": np.array([0, 1, 1]),
            "reward": np.array([1, 2, 3], np.float32),
            "next_observation": np.array([1, 0, 1]),
            "terminated": np.array([False, False, True]),
            "truncated": np.zeros(3, bool),
            "action_mask": allowed,
            "next_action_mask": after,
        }
    )
    assert torch.equal(states(log.transitions)["action_mask"], torch.as_tensor(allowed))
    opened = states(log.transitions, following=True)
    assert opened["action_mask"].tolist() == [[False, True], [True, True], [True, True]]
    assert opened["observation"].tolist() == [1, 0, 1]
    assert set(opened.keys()) == {"observation", "action_mask"}


def test_what_cannot_be_is_refused():
    log = three_episodes()
    for bad in (-0.1, 1.01, True):
        with pytest.raises(ValueError, match=r"discount is .*must lie in \[0, 1\]"):
            check_logs(log, log, bad)
    other = random_mdp().log(uniform(), episodes=20)
    with pytest.raises(ValueError, match="observation_space of train is Discrete"):
        check_logs(log, other, 0.9)
