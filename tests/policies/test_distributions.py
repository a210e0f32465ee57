"""Distributions of actions: each method against numerical integration, SciPy or a loop, and shapes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from small_losses import HIGH, LOW
from torch import distributions as D
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.modules import TanhNormal

from iql_torchrl.policies import (
    Choice,
    ClippedGaussian,
    ClippedMixture,
    OneHotChoice,
    SquashedGaussian,
)

BOUNDS = {"low": LOW, "high": HIGH}
X = np.linspace(-30, 30, 600_001)  # values of a Gaussian
LOC, SCALE = [-2.5, -1.0, 0.1, 0.9, 4.0], [0.2, 0.7, 3.0, 0.05, 1.5]  # the bounds are -1 and 1


def one_dimensional(kind, *parameters, dtype=torch.float64):
    tensors = [torch.tensor(each, dtype=dtype).unsqueeze(-1) for each in parameters]
    if kind is ClippedMixture:
        tensors[0] = tensors[0].squeeze(-1)
    bound = torch.ones(1, dtype=dtype)
    return kind(*tensors, low=-bound, high=bound)


def integral(values, x=X):
    return np.trapezoid(values, x, axis=-1)


def moments(density, action):
    mean = integral(density * action)
    return mean, integral(density * (action - mean[..., None]) ** 2)


def gaussian_density(loc=LOC, scale=SCALE, x=X):
    return stats.norm(np.array(loc)[..., None], np.array(scale)[..., None]).pdf(x)


# -- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_clipped_gaussians_are_those_of_their_samples(dtype):
    dist = one_dimensional(ClippedGaussian, LOC, SCALE, dtype=dtype)
    mean, variance = moments(gaussian_density(), X.clip(-1, 1))
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6)
    close(dist.mean[:, 0], mean)
    close(dist.variance[:, 0], variance)
    close(dist.stddev[:, 0], np.sqrt(variance), atol=2e-3)
    np.testing.assert_allclose(dist.mode[:, 0], np.clip(LOC, -1, 1))
    assert dist.mean.dtype == dist.variance.dtype == dtype
    drawn = dist.sample((200_000,))
    close(drawn.mean(0)[:, 0], mean, atol=0.01)
    close(drawn.std(0)[:, 0], np.sqrt(variance), atol=0.01)


def test_moments_of_clipped_mixtures_are_those_of_their_samples():
    logits, loc, scale = [0.3, -1.0, 1.0], [-1.5, 0.2, 0.9], [0.5, 0.1, 2.0]
    dist = one_dimensional(ClippedMixture, logits, loc, scale)
    density = softmax(logits) @ gaussian_density(loc, scale)
    mean, variance = moments(density, X.clip(-1, 1))
    np.testing.assert_allclose(dist.mean, [mean], rtol=1e-5)
    np.testing.assert_allclose(dist.variance, [variance], rtol=1e-4)
    drawn = dist.sample((200_000,))
    np.testing.assert_allclose(drawn.mean(0), [mean], atol=0.01)
    np.testing.assert_allclose(drawn.std(0), [np.sqrt(variance)], atol=0.01)


def test_entropy_is_that_of_the_density():
    dist = one_dimensional(ClippedGaussian, LOC, SCALE)
    log_density = dist.log_prob(torch.from_numpy(X)[:, None, None]).numpy().T
    density = np.exp(log_density)
    np.testing.assert_allclose(integral(density), 1, rtol=1e-6)
    expected = -integral(density * np.maximum(log_density, -700))
    np.testing.assert_allclose(dist.entropy(), expected, rtol=1e-6, atol=1e-9)
    for other in (
        one_dimensional(SquashedGaussian, LOC, SCALE),
        one_dimensional(ClippedMixture, [0.0] * 5, LOC, SCALE),
    ):
        with pytest.raises(NotImplementedError):
            other.entropy()


def test_entropy_and_divergence_leave_constant_dimensions_out():
    scale, varying = torch.tensor([[0.5, 3.0, 2.0]]), torch.tensor([True, False, True])
    for kind in (ClippedGaussian, SquashedGaussian):
        dist = kind(torch.zeros(1, 3), scale, **BOUNDS, varying=varying)
        other = kind(torch.ones(1, 3), torch.ones(1, 3), **BOUNDS, varying=varying)
        # sum of log(1 / s) + (s**2 + 1) / 2 - 1 / 2
        expected = -np.log(0.5 * 2.0) + (0.5**2 + 2.0**2 + 2) / 2 - 1
        assert D.kl_divergence(dist, other).item() == pytest.approx(expected)
    dist = ClippedGaussian(torch.zeros(1, 3), scale, **BOUNDS, varying=varying)
    assert dist.entropy().item() == pytest.approx(np.log(2 * np.pi * np.e * 0.5 * 2.0))


@pytest.mark.parametrize("kind", [ClippedGaussian, SquashedGaussian])
def test_divergence_is_the_integral(kind):
    p, q = (one_dimensional(kind, [loc], [scale]) for loc, scale in ((0.3, 0.6), (-0.2, 0.9)))
    # a grid in x: the integral of the density of actions over actions, tanh(x) or x
    x = np.linspace(-5, 5, 100_001)
    action = np.tanh(x) if kind is SquashedGaussian else x
    log_p, log_q = (d.log_prob(torch.from_numpy(action)[:, None]).numpy() for d in (p, q))
    assert integral(np.exp(log_p), action) == pytest.approx(1, rel=1e-4)
    expected = integral(np.exp(log_p) * (log_p - log_q), action)
    assert D.kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-3)


def test_squashed_gaussians_have_no_closed_forms_as_torchrls():
    dist = SquashedGaussian(torch.full((7, 3), 9.0), torch.ones(7, 3), **BOUNDS)
    theirs = TanhNormal(torch.full((7, 3), 9.0), torch.ones(7, 3), **BOUNDS)
    for name in ("mean", "mode", "variance", "stddev"):
        with pytest.raises(NotImplementedError, match=r"closed form.*DETERMINISTIC, or estimate"):
            getattr(dist, name)
        with pytest.raises((NotImplementedError, RuntimeError)):
            getattr(theirs, name)
    torch.testing.assert_close(dist.deterministic_sample, theirs.deterministic_sample)


def test_squashed_density_and_samples_are_one_distribution():
    """Shares of samples below some actions, against the integral of the density up to them."""
    dist = one_dimensional(SquashedGaussian, [0.4], [0.8])
    edges = np.array([-0.5, 0.0, 0.38, 0.8])
    grid = np.linspace(-1, 1, 400_001)[1:-1]
    density = dist.log_prob(torch.from_numpy(grid)[:, None]).exp().numpy()
    below = [integral(density[grid <= edge], grid[grid <= edge]) for edge in edges]
    drawn = dist.sample((200_000,)).flatten().numpy()
    np.testing.assert_allclose((drawn[:, None] <= edges).mean(0), below, atol=0.005)
    share = stats.norm.cdf(np.arctanh(edges), 0.4, 0.8)
    np.testing.assert_allclose(below, share, atol=1e-4)


def test_the_mode_of_a_mixture_does_not_depend_on_constant_dimensions():
    loc = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])
    scale = torch.tensor([[0.2, 9.0], [0.4, 0.01]])  # the first is denser where actions vary
    box = {"low": -torch.ones(2), "high": torch.ones(2)}
    dist = ClippedMixture(torch.zeros(2), loc, scale, **box, varying=torch.tensor([True, False]))
    assert dist.mode.tolist() == dist.deterministic_sample.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("kind", [Choice, OneHotChoice])
def test_choices_against_softmax(kind):
    logits = torch.randn(6, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]]).expand(6, 4)
    dist = kind(logits, mask)
    probabilities = softmax(np.where(mask, logits, -np.inf), -1)
    support = dist.enumerate_support()
    np.testing.assert_allclose(dist.log_prob(support).exp().T, probabilities, rtol=1e-12)
    p = probabilities[:, [0, 2, 3]]
    np.testing.assert_allclose(dist.entropy(), -(p * np.log(p)).sum(1), rtol=1e-12)
    spec = Categorical(4) if kind is Choice else OneHot(4)
    assert all(spec.is_in(action) for action in support.flatten(0, 1))
    best = dist.mode if kind is Choice else dist.mode.int().argmax(-1)
    assert best.tolist() == probabilities.argmax(1).tolist()
    if kind is Choice:
        with pytest.raises(RuntimeError, match=r"Choice has no mean.*ExplorationType.MODE"):
            _ = dist.mean
    else:
        np.testing.assert_allclose(dist.mean, probabilities)


def test_ties_go_to_the_first_action():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert Choice(logits).mode.tolist() == [1]
    assert OneHotChoice(logits).mode.tolist() == [[False, True, False, False]]


# -- shapes


def made(kind, batch, varying):
    """A distribution of batch shape ``batch``, and the shape of an action."""
    mask = torch.rand(*batch, 4) < 0.5
    mask[..., 1] = True
    loc, scale = torch.randn(*batch, 3), torch.rand(*batch, 3) + 0.1
    limits = BOUNDS | ({"varying": torch.tensor([True, False, True])} if varying else {})
    if kind is Choice:
        return Choice(torch.randn(*batch, 4), mask), ()
    if kind is OneHotChoice:
        return OneHotChoice(torch.randn(*batch, 4), mask, dtype=torch.int64), (4,)
    if kind is ClippedMixture:
        loc, scale = torch.randn(*batch, 5, 3), torch.rand(*batch, 5, 3) + 0.1
        return ClippedMixture(torch.randn(*batch, 5), loc, scale, **limits), (3,)
    return kind(loc, scale, **limits), (3,)


KINDS = [ClippedGaussian, SquashedGaussian, ClippedMixture, Choice, OneHotChoice]
SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@pytest.mark.parametrize("kind", KINDS)
@given(batch=SHAPES, before=SHAPES, samples=SHAPES, varying=st.booleans())
@settings(max_examples=20, deadline=None)
def test_shapes_and_expand(kind, batch, before, samples, varying):
    dist, event = made(kind, batch, varying)
    assert (dist.batch_shape, dist.event_shape) == (batch, event)
    larger = dist.expand((*before, *batch))
    assert type(larger) is kind
    assert (larger.batch_shape, larger.event_shape) == ((*before, *batch), event)
    action = larger.sample(samples)
    assert action.shape == (*samples, *before, *batch, *event)
    assert larger.support.check(action).all()
    assert larger.log_prob(action).shape == (*samples, *before, *batch)
    torch.testing.assert_close(larger.log_prob(action), dist.log_prob(action))
    assert larger.deterministic_sample.dtype == action.dtype == dist.sample().dtype
    still = dist.deterministic_sample.expand((*before, *batch, *event))
    assert torch.equal(larger.deterministic_sample, still)
    for name in ("mean", "variance", "entropy"):
        try:
            value = getattr(dist, name)
            value = value() if callable(value) else value
        except (NotImplementedError, RuntimeError):
            continue
        of_larger = getattr(larger, name)
        of_larger = of_larger() if callable(of_larger) else of_larger
        torch.testing.assert_close(of_larger, value.expand_as(of_larger), equal_nan=True)
    independent = D.Independent(larger, len(before))  # which expands by ``expand``
    again = independent.expand((2, *independent.batch_shape)).log_prob(still)
    torch.testing.assert_close(again, independent.log_prob(still).expand_as(again))
    assert kind.__name__ in repr(larger)


@pytest.mark.parametrize("kind", [ClippedGaussian, SquashedGaussian, ClippedMixture])
@given(batch=SHAPES, samples=SHAPES)
@settings(max_examples=20, deadline=None)
def test_noise_and_masks_have_the_shapes_of_samples(kind, batch, samples):
    dist, _ = made(kind, batch, False)
    noise = torch.randn(*samples, *batch, 3 + kind.extra_noise)
    action = dist.from_noise(noise)
    assert action.shape == (*samples, *batch, 3)
    every = torch.ones(*batch, 3, dtype=torch.bool)
    assert torch.equal(dist.masked_log_prob(action, every), dist.log_prob(action))
    first = every & torch.tensor([True, False, False])
    parts = [dist.masked_log_prob(action, first), dist.masked_log_prob(action, every & ~first)]
    assert parts[0].shape == (*samples, *batch)
    if kind is not ClippedMixture:  # whose dimensions depend on each other
        torch.testing.assert_close(sum(parts), dist.log_prob(action), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ClippedGaussian, SquashedGaussian, ClippedMixture])
def test_which_samples_have_gradients(kind):
    dist, _ = made(kind, (4,), False)
    assert not dist.sample().requires_grad
    loc = dist.loc.requires_grad_()
    again = type(dist)(*(getattr(dist, name) for name in dist.arg_constraints), **BOUNDS)
    assert not again.sample().requires_grad
    if dist.has_rsample:
        action = again.rsample((3,))
        assert action.shape == (3, 4, 3)
        (gradient,) = torch.autograd.grad(action.sum(), loc)
        assert gradient.abs().sum() > 0
    else:
        with pytest.raises(NotImplementedError):
            again.rsample()


def test_bounds_of_another_dtype_keep_the_dtype_of_the_parameters():
    wide = {name: bound.double() for name, bound in BOUNDS.items()}
    dist = ClippedGaussian(torch.zeros(2, 3), torch.ones(2, 3), **wide)
    assert dist.sample().dtype == dist.mode.dtype == torch.float32
    spec = Bounded(LOW, HIGH, (3,))
    assert spec.is_in(dist.sample((100,)).flatten(0, 1)[0])
