"""Bounds of means over few episodes: against closed forms, and by repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.interpolate import BSpline

from iql_torchrl.selection import bounds
from iql_torchrl.selection.bounds import mean_bounds

LEVEL = 0.025
ERROR = 4 * (LEVEL * (1 - LEVEL) / bounds.MAX_DRAWS) ** 0.5  # of a drawn probability


def one(samples, lowest, highest, **options):
    low, high = mean_bounds(
        np.array([samples], float), np.array([lowest]), np.array([highest]), **options
    )
    return float(low[0]), float(high[0])


def test_one_episode_has_a_uniform_weight():
    low, high = one([3.0], 1.0, 11.0)
    assert low == pytest.approx(1 + 2 * LEVEL, abs=2 * ERROR)
    assert high == pytest.approx(11 - 8 * LEVEL, abs=8 * ERROR)


def test_two_episodes_have_a_triangular_distribution():
    """The mean of three values with uniform spacings as weights; they are 0 and 1, with 4 or -2."""
    low, high = one([0.0, 1.0], -2.0, 4.0)
    below, above = stats.triang(2 / 3, -2, 3), stats.triang(1 / 4, 0, 4)
    assert below.cdf(low) == pytest.approx(LEVEL, abs=ERROR)
    assert above.sf(high) == pytest.approx(LEVEL, abs=ERROR)


def test_distinct_samples_have_a_spline_distribution():
    """Curry and Schoenberg 1966: the density of the weighted mean is the B-spline with these knots."""
    samples = [0.0, 0.7, 1.0, 2.5, 6.0]
    low, high = one(samples, -1.0, 10.0)
    for bound, extreme, tail in ((low, -1.0, LEVEL), (high, 10.0, 1 - LEVEL)):
        knots = np.sort([*samples, extreme])
        density = BSpline.basis_element(knots, extrapolate=False)
        whole = density.integrate(knots[0], knots[-1])
        assert density.integrate(knots[0], bound) / whole == pytest.approx(tail, abs=ERROR)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 10), (3, 10), (10, 10), (1, 60)])
def test_successes_have_the_exact_binomial_interval(successes, episodes):
    """With values 0 and 1 the weight of the ones is a beta variable, as in Clopper and Pearson."""
    low, high = one([1.0] * successes + [0.0] * (episodes - successes), 0.0, 1.0)
    exact = stats.binomtest(successes, episodes).proportion_ci(0.95, "exact")
    spread = 0.1 * (exact.high - exact.low)
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=spread)


def test_many_episodes_have_the_normal_interval():
    samples = np.random.default_rng(0).random(5000)
    spread = samples.std() / len(samples) ** 0.5
    for confidence, deviations in ((0.95, 1.96), (0.8, 1.2816)):
        low, high = one(samples, 0.0, 1.0, confidence=confidence)
        assert samples.mean() - low == pytest.approx(deviations * spread, rel=0.05)
        assert high - samples.mean() == pytest.approx(deviations * spread, rel=0.05)


def skewed(draw, shape):
    return np.minimum(draw.lognormal(0.0, 1.5, shape), 50.0)


def test_few_episodes_of_a_skewed_variable_are_covered():
    """Where the interval of the central limit theorem misses the mean too often."""
    draw = np.random.default_rng(1)
    truth = skewed(draw, 1_000_000).mean()
    samples = skewed(draw, (400, 10))
    low, high = mean_bounds(samples, np.zeros(400), np.full(400, 50.0), together=False)
    missed = ((low > truth) | (high < truth)).mean()
    assert missed <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    spread = stats.t(9).ppf(0.975) * samples.std(1, ddof=1) / 10**0.5
    assert (np.abs(samples.mean(1) - truth) > spread).mean() > 0.12
    assert (high - low < 50).all()


def test_equal_rows_cost_no_more_than_one():
    samples = np.random.default_rng(2).normal(size=(1, 40))
    alone = one(samples[0], -5.0, 5.0)
    low, high = mean_bounds(np.repeat(samples, 6, 0), np.full(6, -5.0), np.full(6, 5.0))
    np.testing.assert_allclose(low, alone[0], atol=2e-3)
    np.testing.assert_allclose(high, alone[1], atol=2e-3)
    assert (low == low[0]).all()


def test_bounds_of_many_rows_hold_at_once(monkeypatch):
    """Eight independent means: of intervals by themselves at least one often misses."""
    monkeypatch.setattr(bounds, "MAX_DRAWS", 1000)
    monkeypatch.setattr(bounds, "MIN_DRAWS", 1000)
    draw, rows, times = np.random.default_rng(3), 8, 120
    limit, missed = np.full(rows, 1.0), {True: 0, False: 0}
    for repetition in range(times):
        samples = draw.uniform(-1, 1, (rows, 60))
        widths = {}
        for together in missed:
            low, high = mean_bounds(samples, -limit, limit, together=together, seed=repetition)
            missed[together] += bool(((low > 0) | (high < 0)).any())
            widths[together] = high - low
        assert (widths[True] > widths[False]).all()
    error = (0.05 * 0.95 / times) ** 0.5
    assert 0 < missed[True] / times <= 0.05 + 3 * error
    assert missed[False] / times > 0.05 + 5 * error


def test_bounds_of_correlated_rows_are_narrower():
    draw = np.random.default_rng(4)
    base = draw.normal(size=(1, 60))
    limit = np.full(10, 8.0)
    widths = []
    for mixed in (0.05, 1.0):
        rows = (1 - mixed) * base + mixed * draw.normal(size=(10, 60))
        rows = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
        low, high = mean_bounds(rows, -limit, limit)
        widths.append((high - low).mean())
    alone = np.diff(one(rows[0], -8.0, 8.0))[0]
    assert 1.02 * alone < 1.1 * widths[0] < widths[1]


def test_a_quantity_between_two_others_has_the_bounds_of_both():
    draw = np.random.default_rng(5)
    least = draw.normal(size=(3, 30))
    most = least + draw.random((3, 30))
    lowest, highest = np.full(3, -4.0), np.full(3, 6.0)
    low, high = mean_bounds(least, lowest, highest, upper_samples=most)
    np.testing.assert_array_equal(low, mean_bounds(least, lowest, highest)[0])
    np.testing.assert_array_equal(high, mean_bounds(most, lowest, highest)[1])


def test_a_missing_limit_leaves_its_side_unbounded_and_one_inside_the_samples_is_widened():
    samples = np.random.default_rng(6).random(20)
    low, high = one(samples, 0.0, np.inf)
    assert low == one(samples, 0.0, 1.0)[0]
    assert high == np.inf
    samples = [0.0, 1.0, 2.0]
    assert one(samples, 0.5, 1.5) == one(samples, 0.0, 2.0)


numbers = st.integers(-1000, 1000).map(lambda x: x / 10)
rows = st.lists(numbers, min_size=4, max_size=4, unique=True)


@given(
    st.lists(rows, min_size=1, max_size=3), numbers, st.floats(0.1, 50),
    st.floats(0, 10), st.floats(0, 10),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_bounds_move_with_the_samples(rows, shift, scale, below, above):
    samples = np.array(rows)
    lowest, highest = samples.min(1) - below, samples.max(1) + above
    low, high = mean_bounds(samples, lowest, highest)
    slack = 1e-9 * (1 + np.abs(samples).max() + below + above)
    assert (lowest - slack <= low).all()
    assert (low <= samples.mean(1) + slack).all()
    assert (samples.mean(1) <= high + slack).all()
    assert (high <= highest + slack).all()
    moved = mean_bounds(*(scale * x + shift for x in (samples, lowest, highest)))
    np.testing.assert_allclose(moved[0], scale * low + shift, atol=1e-6 * (1 + scale * 200))
    np.testing.assert_allclose(moved[1], scale * high + shift, atol=1e-6 * (1 + scale * 200))
    mirrored = mean_bounds(-samples, -highest, -lowest)
    np.testing.assert_allclose(mirrored[0], -high, atol=slack)
    np.testing.assert_allclose(mirrored[1], -low, atol=slack)
