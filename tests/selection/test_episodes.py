"""What offline evaluation reads of episodes: returns, discounts and ends, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_mdp import DISCOUNT, plain_returns, random_mdp, steps_log, uniform

from iql_torchrl.selection.candidates import states
from iql_torchrl.selection.episodes import Episodes, read_datasets, return_range


def three_episodes(going_on=False, **options):
    """Of 3, 2 and 1 steps; the first terminates, the second is cut, the third terminates.

    ``going_on``: the first episode already terminates at its second step, and continues.
    """
    dataset = steps_log(
        6, options, observation=np.arange(6) % 2, next_observation=np.arange(1, 7) % 2,
        reward=np.array([1, 2, 4, -1, 3, 5]), terminated=np.array([0, 0, 1, 0, 0, 1], bool),
        truncated=np.array([0, 0, 0, 0, 1, 0], bool),
    )  # fmt: skip
    rows = dataset.transitions.clone()
    rows["next", "terminated"][1] = going_on
    return replace(dataset, transitions=rows)


def test_rows_of_episodes():
    dataset = Episodes(three_episodes(), 0.5)
    assert (dataset.first.tolist(), dataset.last.tolist()) == ([0, 3, 5], [2, 4, 5])
    for each in (dataset, Episodes(three_episodes(going_on=True), 0.5)):
        assert each.never_terminated.tolist() == [False, True, False]
    assert dataset.horizon == pytest.approx((1.75 + 1.5 + 1) / 3)
    assert [Episodes(three_episodes(), d).horizon for d in (0, 1)] == [1, 2]
    assert dataset.truncation_weight.tolist() == [0, 0.25, 0]
    assert dataset.step.tolist() == [0, 1, 2, 0, 1, 0]
    assert dataset.effective(np.array([1.0, 0, 0, 2, 0, 0])) == pytest.approx(9 / 5)
    assert dataset.effective(np.zeros(6)) == 0


def test_returns_to_go():
    for options in ({}, {"reward": (-7.0, 0.5)}):
        dataset = Episodes(three_episodes(**options), 0.5)
        np.testing.assert_allclose(dataset.reward, [1, 2, 4, -1, 3, 5], atol=1e-5)
        np.testing.assert_allclose(dataset.returns_to_go, [3, 4, 4, 0.5, 3, 5], atol=1e-5)
    going_on = Episodes(three_episodes(going_on=True), 0.5)
    assert going_on.returns_to_go.tolist() == [2, 2, 4, 0.5, 3, 5]
    dataset = random_mdp().dataset(uniform(), episodes=100)
    episodes = Episodes(dataset, DISCOUNT)
    returns = episodes.returns_to_go[episodes.first]
    np.testing.assert_allclose(returns, plain_returns(dataset))


def test_the_range_of_returns_continues_truncated_episodes_as_they_went():
    # The second episode returns -1 + 1.5 = 0.5 over two steps: 0.5 / (1 - 0.25) in all.
    for going_on in (False, True):
        each = Episodes(three_episodes(going_on), 0.5)
        assert return_range(each) == pytest.approx((0.5 / 0.75, 5))
    assert return_range(Episodes(three_episodes(), 0.9))[1] == pytest.approx(
        (-1 + 2.7) / (1 - 0.81)
    )
    halves = [Episodes(part, 0.9) for part in three_episodes().split(0.34, 0)]
    parts = [return_range(part) for part in halves]
    both = min(low for low, _ in parts), max(high for _, high in parts)
    assert return_range(*halves) == both
    closed = steps_log(
        2, observation=np.array([0, 1]), next_observation=np.array([1, 0]),
        reward=np.array([-4, 3]), terminated=np.array([False, True]),
    )  # fmt: skip
    assert return_range(Episodes(closed, 1.0)) == (-1, 3)


def test_masks_that_forbid_everything_after_a_termination_become_all_true():
    allowed = np.array([[1, 0], [0, 1], [1, 1]], bool)
    after = np.array([[0, 1], [1, 1], [0, 0]], bool)
    dataset = steps_log(
        3, observation=np.array([0, 1, 0]), next_observation=np.array([1, 0, 1]),
        action=np.array([0, 1, 1]), terminated=np.array([False, False, True]),
        action_mask=allowed, next_action_mask=after,
    )  # fmt: skip
    assert torch.equal(states(dataset.transitions)["action_mask"], torch.as_tensor(allowed))
    opened = states(dataset.transitions, following=True)
    assert opened["action_mask"].tolist() == [[False, True], [True, True], [True, True]]
    assert opened["observation"].tolist() == [1, 0, 1]
    assert set(opened.keys()) == {"observation", "action_mask"}


def test_what_cannot_be_is_refused():
    dataset = three_episodes()
    for bad in (-0.1, 1.01, True):
        with pytest.raises(ValueError, match=r"discount is .*must lie in \[0, 1\]"):
            read_datasets(dataset, dataset, bad)
    with pytest.raises(ValueError, match="observation_space of train is Discrete"):
        read_datasets(dataset, random_mdp().dataset(uniform(), episodes=20), 0.9)
