"""The equations against SciPy, NumPy and hand numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, special, stats

from iql_torchrl import functional as F

WORKED = torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0], dtype=torch.float64)
samples = arrays(
    np.float64, st.integers(2, 30), elements=st.floats(-50, 50, allow_nan=False, width=32)
)


def minimiser(loss, targets: torch.Tensor) -> float:
    """Prediction of least mean loss, found by SciPy without any gradient of ours."""

    def objective(v: float) -> float:
        return float(loss(targets - v).mean())

    bounds = (float(targets.min()) - 1, float(targets.max()) + 1)
    return float(optimize.minimize_scalar(objective, bounds=bounds, options={"xatol": 1e-10}).x)


def test_worked_example_of_the_expectile():
    half = minimiser(lambda e: F.expectile_loss(e, expectile=0.5), WORKED)
    assert half == pytest.approx(3.0, abs=1e-6)
    # by hand: (1 + 2 + 3) * 0.3 + (4 + 5) * 0.7 over 3 * 0.3 + 2 * 0.7 = 8.1 / 2.3, and
    # (1 + 2 + 3 + 4) * 0.1 + 5 * 0.9 over 4 * 0.1 + 0.9 = 5.5 / 1.3
    for tau, by_hand in ((0.7, 8.1 / 2.3), (0.9, 5.5 / 1.3)):
        ours = minimiser(lambda e, t=tau: F.expectile_loss(e, expectile=t), WORKED)
        assert stats.expectile(WORKED.numpy(), tau) == pytest.approx(by_hand)
        assert ours == pytest.approx(by_hand, abs=1e-6)


def test_expectile_loss_by_hand_and_its_sign():
    loss = F.expectile_loss(torch.tensor([2.0, -2.0, 0.0]), expectile=0.7)
    torch.testing.assert_close(loss, torch.tensor([2.8, 1.2, 0.0]))
    assert loss[0] > loss[1], "a prediction too low (positive error) must cost more"
    of_one = F.expectile_loss(torch.tensor([1.0, -1.0]), expectile=1.0)
    assert of_one.tolist() == [1.0, 0.0], "expectile 1 is the maximum"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_near_one_are_not_rounded_in_half_precision(dtype):
    error = torch.tensor([-3.0, 3.0], dtype=dtype)
    for level in (0.999, torch.tensor(0.999, dtype=torch.float64)):
        expectile = F.expectile_loss(error, expectile=level)
        quantile = F.quantile_loss(error, quantile=level)
        assert expectile.dtype == quantile.dtype == dtype
        assert expectile.tolist() == pytest.approx([0.009, 8.991], rel=0.005)
        assert quantile.tolist() == pytest.approx([0.003, 2.997], rel=0.005)


@given(samples, st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_expectile_loss_is_minimised_by_scipys_expectile(x, tau):
    ours = minimiser(lambda e: F.expectile_loss(e, expectile=tau), torch.from_numpy(x))
    assert ours == pytest.approx(stats.expectile(x, tau), abs=1e-3)


@given(samples, st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_quantile_loss_is_minimised_by_numpys_quantile(x, level):
    x_t = torch.from_numpy(x)

    def mean_loss(v: float) -> float:
        return float(F.quantile_loss(x_t - v, quantile=level).mean())

    # a quantile of a sample is one of its points; no point may do better than NumPy's
    best = min(mean_loss(v) for v in x)
    at_numpys = mean_loss(float(np.quantile(x, level, method="inverted_cdf")))
    assert at_numpys == pytest.approx(best, rel=1e-6, abs=1e-9)


@given(samples, st.floats(0.01, 0.99), st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_expectile_loss_properties(x, tau, scale):
    e = torch.from_numpy(x)
    loss = F.expectile_loss(e, expectile=tau)
    assert (loss >= 0).all()
    torch.testing.assert_close(F.expectile_loss(scale * e, expectile=tau), scale**2 * loss)
    torch.testing.assert_close(F.expectile_loss(-e, expectile=1 - tau), loss)
    torch.testing.assert_close(F.expectile_loss(e, expectile=0.5), 0.5 * e.square())


@given(samples, st.floats(0.5, 20))
@settings(max_examples=60, deadline=None)
def test_sparse_loss_is_minimised_where_the_weights_have_mean_one(x, alpha):
    def excess(v: float) -> float:  # falls in v: no weight of mean 1 lies outside of the samples
        return float(np.maximum(1 + (x - v) / (2 * alpha), 0).mean()) - 1

    exact = optimize.brentq(excess, x.min() - 1e-6, x.max() + 1e-6)
    ours = minimiser(lambda e: F.sparse_loss(e, alpha=alpha), torch.from_numpy(x))
    assert ours == pytest.approx(exact, abs=1e-3)
    assert x.mean() - 1e-3 <= ours <= x.max() + 1e-3
    weight = F.sparse_weight(torch.from_numpy(x - exact), alpha=alpha, max_weight=math.inf)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-6)


@given(samples, st.floats(2, 20))
@settings(max_examples=60, deadline=None)
def test_gumbel_loss_is_minimised_by_scipys_log_sum_exp(x, alpha):
    exact = alpha * (special.logsumexp(x / alpha) - math.log(len(x)))
    none = torch.zeros(())  # the same rescaling for all predictions, as SciPy's search needs
    ours = minimiser(lambda e: F.gumbel_loss(e, alpha=alpha, largest=none), torch.from_numpy(x))
    assert ours == pytest.approx(exact, abs=2e-3)


def test_extremes_of_alpha_are_the_mean_and_the_maximum():
    # near 0 the greatest of n samples alone decides: 1 + (5 - v) / (2 alpha) = n, and
    # exp((5 - v) / alpha) = n
    for loss, near in (
        (F.sparse_loss, 5 - 2 * 0.05 * 4),
        (lambda e, alpha: F.gumbel_loss(e, alpha=alpha, largest=e[:1] * 0), 5 - 0.05 * math.log(5)),
    ):
        large = minimiser(lambda e, f=loss: f(e, alpha=1e3), WORKED)
        assert large == pytest.approx(3.0, abs=5e-3)
        small = minimiser(lambda e, f=loss: f(e, alpha=0.05), WORKED)
        assert small == pytest.approx(near, abs=1e-4)
        assert small > minimiser(lambda e, f=loss: f(e, alpha=0.5), WORKED) > large


Q, V = np.array([0.3, -4.0, 2.5, 9.0, 1.0, 0.0]), np.array([0.1, 1.0, 2.0, -1.0, 1.5, 0.4])
ALPHA = 0.8


def of_authors(name: str, v: np.ndarray) -> np.ndarray:
    """The per-sample losses of the authors' code at Q: critic.py of IVR and of XQL."""
    if name == "sparse":
        term = (Q - v) / (4 * ALPHA) + 0.5  # their alpha is 4 times that of the paper
        return np.where(term > 0, term**2, 0) + v / (4 * ALPHA)
    z = np.minimum((Q - v) / ALPHA, {"exponential": 5.0, "gumbel": 7.0}[name])
    # what they detach: the largest at V, not at v
    largest = max(np.minimum((Q - V) / ALPHA, {"exponential": 5.0, "gumbel": 7.0}[name]).max(), -1)
    return np.exp(z - largest) - z * np.exp(-largest) - np.exp(-largest)


@pytest.mark.parametrize("name", ["sparse", "exponential", "gumbel"])
def test_values_and_gradients_are_those_of_the_authors_code(name):
    value = torch.from_numpy(V).requires_grad_()
    error = torch.from_numpy(Q) - value
    if name == "sparse":
        loss = F.sparse_loss(error, alpha=ALPHA) / 4
        theirs = of_authors(name, V) - Q / (4 * ALPHA) - 0.25
    else:
        loss = F.gumbel_loss(error, alpha=ALPHA, clip={"exponential": 5.0, "gumbel": 7.0}[name])
        theirs = of_authors(name, V)
    np.testing.assert_allclose(loss.detach().numpy(), theirs, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    step = 1e-6
    slope = (of_authors(name, V + step) - of_authors(name, V - step)) / (2 * step)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-6, atol=1e-9)
    # (9 + 1) / 0.8 = 12.5 is above both clips, so V ignores that sample
    assert (gradient[3] == 0) == (name != "sparse")
    assert gradient[2] < 0 < gradient[1], "V too low must rise, too high must fall"


def test_losses_with_alpha_by_hand():
    error = torch.tensor([2.0, -2.0, -6.0, 0.0])
    # (error / 2)**2 above -2, and -error - 1 below
    assert F.sparse_loss(error, alpha=1.0).tolist() == [1.0, 1.0, 5.0, 0.0]
    e = math.e
    by_hand = [math.exp(0), 1 / e**3 + 0 / e**2, (math.exp(-6) + 5) / e**2, 0]
    by_hand[0], by_hand[1] = (e**2 - 3) / e**2, (math.exp(-2) + 1) / e**2
    ours = F.gumbel_loss(error, alpha=1.0)
    torch.testing.assert_close(ours, torch.tensor(by_hand))
    assert (F.gumbel_loss(torch.tensor([-3.0]), alpha=1.0) - e * (math.exp(-3) + 2)).abs() < 1e-5
    for loss in (F.sparse_loss, F.gumbel_loss, lambda e, alpha: F.sparse_weight(
        e, alpha=alpha, max_weight=1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="alpha is 0; it must be > 0"):
            loss(error, alpha=0)


def test_huge_errors_stay_finite_and_nan_stays_nan():
    error = torch.tensor([1e20, -1e20, 300.0, 0.0], requires_grad=True)
    for clip in (None, 5.0):
        loss = F.gumbel_loss(error, alpha=1.0, clip=clip)
        (gradient,) = torch.autograd.grad(loss.sum(), error)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
    assert F.sparse_loss(torch.tensor([1e15, -1e15]), alpha=1.0).isfinite().all()
    nan = torch.tensor([torch.nan])
    for function in (F.sparse_loss, F.gumbel_loss):
        assert function(nan, alpha=1.0).isnan().all()
    assert F.positive_weight(nan, max_weight=1.0).isnan().all()


def test_weights_without_exponential_by_hand():
    advantage = torch.tensor([-3.0, -1.0, 0.0, 1.0, 500.0])
    weight = F.positive_weight(advantage, max_weight=100.0)
    assert weight.tolist() == [0.0, 0.0, 0.0, 1.0, 100.0]
    weight = F.sparse_weight(advantage, alpha=1.0, max_weight=100.0)
    assert weight.tolist() == [0.0, 0.5, 1.0, 1.5, 100.0]
    columns = torch.tensor([[1.0], [2.0]])  # of two runs
    weight = F.sparse_weight(advantage.expand(2, 5), alpha=columns, max_weight=columns)
    assert weight.tolist() == [[0.0, 0.5, 1.0, 1.0, 1.0], [0.25, 0.75, 1.0, 1.25, 2.0]]


def test_pessimistic_values_by_hand():
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    assert F.pessimistic_value(values, pessimism=None).tolist() == [1.0, 5.0]
    # the mean is 4, and the deviations -3, -1 and 4 have the variance 26 / 3
    expected = torch.tensor([4 - 0.5 * math.sqrt(26 / 3), 5.0])
    torch.testing.assert_close(F.pessimistic_value(values, pessimism=0.5), expected)
    assert F.pessimistic_value(values, pessimism=0).tolist() == [4.0, 5.0]
    two = torch.randn(2, 100, dtype=torch.float64)
    torch.testing.assert_close(F.pessimistic_value(two, pessimism=1.0), two.amin(0))
    assert torch.equal(F.pessimistic_value(two[:1], pessimism=3.0), two[0])


def test_weight_by_hand():
    advantage = torch.tensor([0.0, 1.0, -1.0, 10.0])
    weight = F.exponential_weight(advantage, temperature=3.0, max_weight=100.0)
    expected = torch.tensor([1.0, math.exp(3), math.exp(-3), 100.0])
    torch.testing.assert_close(weight, expected)
    cloning = F.exponential_weight(torch.randn(100) * 50, temperature=0.0, max_weight=100.0)
    assert (cloning == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_weight", [100.0, 7.3, 0.5])
def test_huge_advantages_do_not_overflow_and_nan_stays_nan(dtype, max_weight):
    advantage = torch.tensor([1e30, -1e30, float("nan"), 50.0], dtype=dtype, requires_grad=True)
    weight = F.exponential_weight(advantage, temperature=3.0, max_weight=max_weight)
    assert weight[0] == torch.tensor(max_weight, dtype=dtype)
    assert weight[1] == 0
    assert weight[2].isnan()
    (grad,) = torch.autograd.grad(weight[:2].sum() + weight[3], advantage)
    assert (grad[:2] == 0).all()


@given(samples, st.floats(0, 20), st.floats(0.1, 200))
@settings(max_examples=50, deadline=None)
def test_weight_is_monotone_and_bounded(x, temperature, clip):
    advantage = torch.from_numpy(x).sort().values
    weight = F.exponential_weight(advantage, temperature=temperature, max_weight=clip)
    assert ((weight >= 0) & (weight <= clip)).all()
    assert (weight.diff() >= 0).all()


def test_td_target_by_hand():
    ended, gamma = torch.tensor([False, True, False]), torch.tensor([0.9, 0.9, 0.5])
    reward, ahead = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([10.0, float("nan"), 4.0])
    target = F.td_target(reward, ahead, ended, gamma=gamma)
    torch.testing.assert_close(target, torch.tensor([10.0, 1.0, 4.0]))


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5, 6, 3), (3, 3, 3)])
def test_every_form_of_action_picks_its_value(shape):
    """Also in sequences, and where there are as many actions as critics and steps."""
    values = torch.arange(math.prod(shape)).view(shape).float()
    index = torch.randint(shape[-1], shape[1:-1])
    expected = torch.zeros(shape[:-1])
    for place in np.ndindex(*shape[:-1]):
        expected[place] = values[(*place, index[place[1:]])]
    one_hot = torch.nn.functional.one_hot(index, shape[-1])
    forms = [index[..., None], one_hot, one_hot.float(), one_hot.bool()]
    for action in forms if len(shape) > 3 or shape[1] == shape[2] else [index, *forms]:
        assert torch.equal(F.pick_action(values, action), expected)


def test_pick_action_by_hand_and_its_refusals():
    values = torch.arange(24.0).view(2, 3, 4)  # K = 2, B = 3, N = 4
    picked = F.pick_action(values, torch.tensor([1, 0, 3]))
    assert picked.tolist() == [[1.0, 4.0, 11.0], [13.0, 16.0, 23.0]]
    with pytest.raises(ValueError, match="at least two"):
        F.pick_action(torch.randn(2, 8, 1), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"action has shape \(7,\)"):
        F.pick_action(torch.randn(2, 8, 4), torch.zeros(7, dtype=torch.long))


def test_regression_losses_by_hand_and_their_refusals():
    with pytest.raises(ValueError, match=r"\(4, 1\) and target \(4,\)"):
        F.regression_loss(torch.zeros(4, 1), torch.zeros(4), loss_function="l2")
    with pytest.raises(ValueError, match="huber"):
        F.regression_loss(torch.zeros(4), torch.zeros(4), loss_function="huber")
    prediction, target = torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0])
    by_hand = {"l2": [0.25, 9.0], "l1": [0.5, 3.0], "smooth_l1": [0.125, 2.5]}
    for name, expected in by_hand.items():
        loss = F.regression_loss(prediction, target, loss_function=name)
        torch.testing.assert_close(loss, torch.tensor(expected))


def test_reductions_by_hand():
    value = torch.tensor([1.0, 2.0, 4.0, float("nan")], requires_grad=True)
    mask, weight = torch.arange(4) < 3, torch.tensor([1.0, 0.5, 0.5, 9.0])
    assert F.weighted_mean(value[:3]).item() == pytest.approx(7 / 3)
    mean = F.weighted_mean(value, mask=mask, weight=weight)
    assert mean.item() == pytest.approx((1 + 1 + 2) / 2)
    total = F.reduce(value, reduction="sum", mask=mask, weight=weight)
    assert total.item() == pytest.approx(4.0)
    assert F.reduce(value, reduction="none", mask=mask).tolist() == [1.0, 2.0, 4.0, 0.0]
    with pytest.raises(ValueError, match="median"):
        F.reduce(value, reduction="median")
    mean = F.weighted_mean(value, mask=mask)  # nan behind a mask reaches no gradient
    assert mean.item() == pytest.approx(7 / 3)
    mean.backward()
    torch.testing.assert_close(value.grad, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
    value.grad = None
    nothing = F.weighted_mean(value, mask=mask & False)
    nothing.backward()
    assert nothing == 0
    assert (value.grad == 0).all()
    draws, weight = torch.randn(50), torch.rand(50)
    expected = np.average(draws.numpy(), weights=weight.numpy())
    assert F.weighted_mean(draws, weight=weight) == pytest.approx(expected, rel=1e-5)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0.01, 100)))
@settings(max_examples=40, deadline=None)
def test_effective_sample_size(w):
    assert F.effective_sample_size(torch.full((7,), 3.0)) == pytest.approx(7)
    assert F.effective_sample_size(torch.zeros(7)) == 0
    assert F.effective_sample_size(torch.full((7,), 1e-30)) == pytest.approx(7)
    assert F.effective_sample_size(torch.full((7,), 100.0, dtype=torch.float16)) == 7
    assert F.effective_sample_size(torch.zeros(0)) == 0
    ess = F.effective_sample_size(torch.from_numpy(w)).item()
    assert ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-9)
    assert 1 - 1e-9 <= ess <= len(w) + 1e-9


def test_an_empty_batch_has_no_gumbel_loss():
    assert F.gumbel_loss(torch.zeros(0), alpha=1.0).shape == (0,)
