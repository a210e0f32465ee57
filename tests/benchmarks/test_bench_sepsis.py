"""``benchmarks/bench_sepsis.py``: IQL's equations solved on the counts of a dataset, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from extras import needs
from tensordict import TensorDict

from iql_torchrl import IQLConfig

needs("icu_sepsis")
import bench_sepsis  # noqa: E402 (it registers the environment)


def steps(*rows):
    """``(state, action, reward, next state, terminated)`` as a table."""
    state, action, reward, following, ended = (torch.tensor(c) for c in zip(*rows, strict=True))
    return TensorDict(
        {
            "observation": state,
            "action": action,
            "next": {
                "observation": following,
                "reward": reward.float().unsqueeze(-1),
                "terminated": ended.unsqueeze(-1),
            },
        },
        batch_size=[len(rows)],
    )


LOG = steps(
    # State 1, treatment 0: 4 or 0, so Q = 2; treatment 1: Q = 0.
    (1, 0, 4, 2, True), (1, 0, 0, 2, True), (1, 1, 0, 2, True), (1, 1, 0, 2, True),
    # State 0, treatment 0 leads to state 1; treatment 1 ends with 1, thrice.
    (0, 0, 0, 1, False), (0, 1, 1, 2, True), (0, 1, 1, 2, True), (0, 1, 1, 2, True),
)  # fmt: skip
ADMISSIBLE = np.array([[True, True], [True, True], [True, False]])
CONFIG = IQLConfig(expectile=0.75, discount=0.5, temperature=2.0)


def test_tabular_iql_by_hand():
    result = bench_sepsis.tabular_iql(LOG, ADMISSIBLE, CONFIG)
    # V(1): 0.75 * 2 (2 - V) = 0.25 * 2 (V - 0), so 1.5; then Q(0, 0) = 0.5 * 1.5.
    # V(0): 0.75 * 3 (1 - V) = 0.25 * 1 (V - 0.75), so 0.975.
    np.testing.assert_allclose(result.value, [0.975, 1.5, 0.0], atol=1e-9)
    np.testing.assert_allclose(result.qvalue, [[0.75, 1.0], [2.0, 0.0], [0.0, 0.0]], atol=1e-9)
    first = [math.exp(2 * (0.75 - 0.975)), 3 * math.exp(2 * (1 - 0.975))]
    second = [math.exp(2 * 0.5), math.exp(2 * -1.5)]
    expected = [np.divide(w, sum(w)) for w in (first, second)]
    np.testing.assert_allclose(result.policy, [*expected, [1.0, 0.0]], atol=1e-9)


def test_tabular_iql_at_its_extremes():
    tabular_iql = bench_sepsis.tabular_iql
    cloned = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, temperature=0.0))
    np.testing.assert_allclose(cloned.policy, [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    capped = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, max_weight=1.0))
    worse = math.exp(-3.0)
    np.testing.assert_allclose(capped.policy[1], np.divide([1.0, worse], 1 + worse))
    mean = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, expectile=0.5))
    # V(1) = 1 and Q(0, 0) = 0.5, one step in four.
    np.testing.assert_allclose(mean.value, [(0.5 + 3.0) / 4, 1.0, 0.0], atol=1e-9)
    greedy = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, temperature=1e6))
    assert np.isfinite(greedy.policy).all()
    assert greedy.policy[1, 0] == 1.0
