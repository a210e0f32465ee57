"""Interquartile mean and probability of improvement over tasks, and their stratified intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from iql_torchrl.evaluation.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)

FIRST = [np.array([0.0, 1.0, 2.0, 9.0]), np.array([5.0, 6.0, 7.0, 8.0])]
SECOND = [np.array([1.0, 1.0, 3.0, 3.0]), np.array([0.0, 9.0, 6.5, 9.0])]


def random_tasks(seed: int, runs: int = 5, tasks: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [task + generator.normal(size=runs) for task in range(tasks)]


def test_by_hand():
    # of 0 1 2 5 6 7 8 9 the middle four
    assert interquartile_mean(*FIRST) == pytest.approx((2 + 5 + 6 + 7) / 4)
    # task 1: 0 beats none; 1 equals two: 1; 2 beats two: 2; 9 beats four: 4. Task 2: 5 and 6 beat
    # one, 7 and 8 beat two.
    assert probability_of_improvement(*FIRST, *SECOND) == pytest.approx((7 / 16 + 6 / 16) / 2)
    assert probability_of_improvement(*SECOND, *FIRST) == pytest.approx(1 - 6.5 / 16)
    assert probability_of_improvement(*FIRST, *FIRST) == 0.5


def test_other_axes_are_kept():
    both = [np.stack(pair) for pair in zip(FIRST, SECOND, strict=True)]
    expected = [interquartile_mean(*FIRST), interquartile_mean(*SECOND)]
    assert interquartile_mean(*both, axis=-1).tolist() == pytest.approx(expected)
    assert interquartile_mean(*(b.T for b in both), axis=0).tolist() == pytest.approx(expected)
    stacked = probability_of_improvement(both[0], both[0][::-1])
    alone = [
        probability_of_improvement(FIRST[0], SECOND[0]),
        probability_of_improvement(SECOND[0], FIRST[0]),
    ]
    assert stacked.tolist() == pytest.approx(alone)


def test_against_scipy():
    one, other = random_tasks(0), random_tasks(1, runs=4)
    pooled = np.concatenate(one)
    assert interquartile_mean(*one) == pytest.approx(stats.trim_mean(pooled, 0.25))
    shares = [
        stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
        for x, y in zip(one, other, strict=True)
    ]
    assert probability_of_improvement(*one, *other) == pytest.approx(np.mean(shares))


@pytest.mark.parametrize(
    ("statistic", "samples"),
    [
        (interquartile_mean, random_tasks(0)),
        (probability_of_improvement, [*random_tasks(0), *(t - 0.5 for t in random_tasks(1))]),
    ],
)
def test_the_interval_is_the_percentile_bootstrap(statistic, samples):
    """Of 20,000 draws of runs, those of one sample after the other."""
    low, high = stratified_interval(statistic, samples, seed=0)
    generator = np.random.default_rng(7)
    drawn = [s[generator.integers(len(s), size=(20_000, len(s)))] for s in samples]
    expected = np.percentile(statistic(*drawn), [2.5, 97.5])
    # the ends of 20,000 draws vary by about a hundredth of the width
    assert (low, high) == pytest.approx(expected, abs=0.03 * (expected[1] - expected[0]))
    assert low < statistic(*samples) < high
    assert stratified_interval(statistic, samples, seed=0) == (low, high)


def test_tasks_are_resampled_separately_and_what_has_no_interval():
    """Runs that are equal within a task leave nothing to vary, however different the tasks are."""
    constant = [np.full(3, 1.0), np.full(3, 50.0)]
    assert stratified_interval(interquartile_mean, constant, seed=0) == (25.5, 25.5)
    for bad in ([np.ones(1)], [np.array([1.0, math.nan]), np.ones(2)]):
        assert all(map(math.isnan, stratified_interval(interquartile_mean, bad, seed=0)))
    with pytest.raises(ValueError, match="3 arrays; expected as many"):
        probability_of_improvement(*FIRST, SECOND[0])
