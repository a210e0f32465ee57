"""Rank correlations of the two estimators, computed by hand, and where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from iql_torchrl.selection.rank import _agreement

from iql_torchrl.evaluation.statistics import rank_correlations


def agreement(values, checks, doubts=((),) * 5):
    pairs = zip(values, checks, doubts, strict=False)
    return _agreement([{"value": v, "importance_value": c, "doubts": d} for v, c, d in pairs])


def test_rank_correlations_by_hand():
    """Values 1..5 against 2, 1, 4, 3, 5: 2 of 10 pairs are discordant, squared rank differences 4."""
    assert agreement([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx((1 - 6 * 4 / 120, 0.6))
    # One tie on one side: tau-b is 5 / sqrt(5 * 6); the ranks are 1.5, 1.5, 3, 4.
    spearman, kendall = agreement([1, 1, 2, 3], [1, 2, 3, 4])
    assert spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert kendall == pytest.approx(5 / math.sqrt(30))


@pytest.mark.parametrize(
    ("values", "checks"),
    [
        ([1, 2], [1, 2]),
        ([1, 1, 1], [1, 2, 3]),
        ([1, 2, 3], [2, 2, 2]),
        ([1, math.nan, 2], [1, 2, 3]),
    ],
)
def test_rank_correlations_that_are_not_defined_are_nan(values, checks):
    assert np.isnan(agreement(values, checks)).all()


@pytest.mark.parametrize("values", [([1.0], [2.0]), ([], []), ([1.0, 1.0], [1.0, 2.0])])
def test_too_few_or_equal_values_have_no_rank_correlation(values):
    assert np.isnan(rank_correlations(*values)).all()


def test_doubted_importance_weights_do_not_enter_the_rank_correlations():
    doubts = [(), (), ("importance",), (), ("range",)]
    assert agreement([1, 2, 3, 4, 5], [1, 2, 99, 4, 5], doubts) == pytest.approx((1.0, 1.0))
